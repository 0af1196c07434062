"""Copies of an engine on several devices answer every request as one device does, under one numbering."""

import numpy as np
import pytest
from decode_examples import decode_model, make_params, model_config
from engine_examples import OPTIONS, check_empty, make_requests, serve

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineMesh
from mor_jax.infer.language_model import LanguageModel
from mor_jax.infer.replicas import Replicas, copy_meshes
from mor_jax.infer.request import Request

MODELS = {"vanilla": ("none", "none", "recursion"), "expert": ("expert", "middle_cycle", "recursion")}
MESH = EngineMesh(data=2, tensor=2)


@pytest.fixture(scope="module", params=["vanilla", pytest.param("expert", marks=pytest.mark.slow)])
def config(request):
    fields = {"num_layers": 2} if request.param == "vanilla" else {}
    return model_config(*MODELS[request.param], vocab_size=32, **fields)  # 31 do not divide


@pytest.fixture(scope="module")
def replicas(config):
    models = [prepare_weights(config, make_params(config), mesh=mesh) for mesh in copy_meshes(MESH)]
    replicas = Replicas(models, OPTIONS)
    replicas.warm_up()
    return replicas


@pytest.fixture(scope="module")
def alone(config):
    """What each request gets from one device."""
    requests = make_requests(24)
    return requests, serve(Engine(decode_model(config), OPTIONS), requests)


def _plain(result):
    return [(t.token, t.depth, t.finished) for t in result]


def _check_empty(replicas):
    assert not replicas.busy and not replicas.drain()
    assert replicas.waiting == replicas.running == 0
    assert replicas._home == {} and replicas._numbers == [{}, {}]
    for engine in replicas.engines:
        check_empty(engine)
    assert all(held == 0 and pages > 0 for held, pages in replicas.pages_held())
    assert replicas.measure().used == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_two_copies_on_two_devices_each_give_what_one_device_gives(replicas, alone, seed):
    requests, want = alone
    replicas.reset_statistics()
    before = compilations()
    got = serve(replicas, requests, seed)
    assert compilations() == before
    for one, other in zip(got, want, strict=True):
        assert _plain(one) == _plain(other)
    shares = [engine.statistics.tokens for engine in replicas.engines]
    assert min(shares) > 0 and sum(shares) == replicas.statistics.tokens == sum(map(len, want))
    _check_empty(replicas)


def test_copies_lie_on_devices_of_their_own(replicas):
    first, second = ({d.id for d in engine.model.mesh.devices.flat} for engine in replicas.engines)
    assert len(first) == len(second) == 2 and not first & second
    assert replicas.places == 2 * replicas.shape.places and replicas.max_running == 2 * OPTIONS.max_running


def test_a_request_goes_to_the_copy_with_fewer(replicas):
    numbers = [replicas.submit(make_requests(1)[0]) for _ in range(4)]
    assert [engine.waiting for engine in replicas.engines] == [2, 2]
    for number in (numbers[0], numbers[2]):
        replicas.cancel(number)
    assert sorted(engine.waiting for engine in replicas.engines) == [0, 2]
    more = replicas.submit(make_requests(1)[0])
    assert sorted(engine.waiting for engine in replicas.engines) == [1, 2]
    for number in (*numbers, more):
        replicas.cancel(number)  # those cancelled already are ignored
    _check_empty(replicas)


def test_cancelled_requests_give_nothing_more_and_leave_nothing(replicas, alone):
    requests, want = alone
    numbers = [replicas.submit(request) for request in requests]
    rng, cancelled, got = np.random.default_rng(0), set(), {number: [] for number in numbers}
    while replicas.busy:
        for token in replicas.step():
            assert token.request not in cancelled
            got[token.request].append(token)
        for number in map(int, rng.choice(numbers, 2)):
            if len(cancelled) < 10 and not (got[number] and got[number][-1].finished):
                replicas.cancel(number)
                cancelled.add(number)
    assert not replicas.drain() and len(cancelled) == 10
    for number, result in zip(numbers, want, strict=True):
        if number not in cancelled:
            assert _plain(got[number]) == _plain(result)
    _check_empty(replicas)


def test_what_can_never_be_served_is_refused(replicas):
    with pytest.raises(UserError, match="the prompt holds no token"):
        replicas.submit(Request((), 1))
    _check_empty(replicas)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "mesh.data=0 must be positive"),
        ({"tensor": -1}, "mesh.tensor=-1 must be positive"),
        ({"data": 3, "tensor": 3}, "mesh.data=3 x mesh.tensor=3 = 9 devices, but there are 8"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        copy_meshes(EngineMesh(**sizes))


@pytest.mark.slow
def test_text_from_several_devices_is_that_of_one():
    config = model_config("expert", "middle_cycle", vocab_size=258, num_layers=5, context_length=32)
    one, several = (
        LanguageModel(config, make_params(config), Tokenizer.bytes_level(), mesh=mesh) for mesh in (EngineMesh(), MESH)
    )
    arguments = {"max_tokens": 9, "temperature": 0.5, "seed": 3}
    prompts = ["first", "", "a third"]
    for completion, other in zip(
        one.generate(prompts, **arguments), several.generate(prompts, **arguments), strict=True
    ):
        assert completion.tokens == other.tokens and completion.depths == other.depths
        assert completion.text == other.text

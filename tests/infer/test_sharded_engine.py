"""An engine over several devices gives what one device gives, moves activations only, and never compiles once warm."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_examples import make_params, model_config, router_bias
from engine_examples import OPTIONS, make_requests, serve

from mor_jax.config import MeshConfig
from mor_jax.errors import UserError
from mor_jax.infer import paged_attention as attention
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.infer.engine_state import empty_control
from mor_jax.infer.prefill import prefill
from mor_jax.infer.sampling import Sampling
from mor_jax.infer.stages import dispatch
from mor_jax.mesh.mesh import make_mesh, on_mesh
from mor_jax.plan.collectives import collectives
from mor_jax.plan.hlo import parse

SHARDS, WIDTH = 2, 16
MODELS = {
    "expert": ("expert", "middle_cycle", "recursion"),
    "vanilla": ("none", "none", "recursion"),
    "shared": ("expert-aux", "cycle", "shared"),
    "token": ("token-bias", "middle_cycle", "shared"),
    "sequence": ("none", "middle_sequence", "shared"),
}
OPTIONS = dataclasses.replace(OPTIONS, block_pages=None, edge_pages=None)


def _config(name, **fields):
    return model_config(*MODELS[name], vocab_size=32, **fields)  # 31 do not divide


def _models(config, shards=SHARDS):
    """The model on one device, and shared by several others."""
    mesh = make_mesh(MeshConfig(tensor=shards), jax.devices()[1 : 1 + shards])
    prepare = lambda mesh: prepare_weights(config, make_params(config), router_bias_R=router_bias(config), mesh=mesh)  # noqa: E731
    return prepare(None), prepare(mesh)


def _requests(count=16):
    """Greedy ones, those that ask for more, draws, and draws from a part of the vocabulary."""
    cut, biased = Sampling(1.5, top_k=5, top_p=0.9, seed=7), Sampling(logit_bias=((3, 2.0), (30, -9.0)))
    more = {"sampling": biased, "alternatives": 3, "score_prompt": True, "min_tokens": 1}
    fields = ({}, more, {"sampling": Sampling(1.5, seed=7)}, {"sampling": cut})
    return [dataclasses.replace(request, **fields[i % 4]) for i, request in enumerate(make_requests(count))]


def _check_equal(got, want):
    for one, other in zip(got, want, strict=True):
        assert [t.token for t in one] == [t.token for t in other]
        assert [t.depth for t in one] == [t.depth for t in other]
        np.testing.assert_allclose(
            [t.log_probability for t in one], [t.log_probability for t in other], atol=1e-5, rtol=0
        )
        assert [[k for k, _ in t.alternatives] for t in one] == [[k for k, _ in t.alternatives] for t in other]
        scores = [[token.prompt.log_probabilities for token in tokens if token.prompt] for tokens in (one, other)]
        np.testing.assert_allclose(*scores, atol=1e-5, rtol=0)


def _check_model(config, shards=SHARDS, options=OPTIONS):
    """Serve by one device and by several; return the engine of several."""
    one, several = (Engine(model, options) for model in _models(config, shards))
    several.warm_up()
    before, requests = compilations(), _requests()
    got = serve(several, requests)
    assert compilations() == before
    _check_equal(got, serve(one, requests, seed=1))
    return several


@pytest.fixture(scope="module")
def engine():
    return _check_model(_config("expert", num_layers=5))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert", "shared", "token", "sequence", "vanilla"])
def test_every_kind_of_model_gives_what_one_device_gives(name):
    _check_traffic(_check_model(_config(name)))


@pytest.mark.slow
def test_four_devices_unshared_norms_and_an_untied_head_give_what_one_device_gives():
    sizes = {"num_heads": 8, "num_kv_heads": 4, "share_norms": False, "tie_embeddings": False}
    _check_traffic(_check_model(_config("expert", **sizes), shards=4))


@pytest.mark.slow
def test_pools_in_int8_are_split_with_their_scales_and_give_what_one_device_gives():
    engine = _check_model(_config("expert", num_layers=5), options=dataclasses.replace(OPTIONS, kv_dtype="int8"))
    pools = jax.tree.leaves([(pool.keys, pool.values) for pool in engine._state.cache.pools])
    assert {array.dtype.name for array in pools} == {"int8", "bfloat16"}
    assert {array.sharding.spec for array in pools} == {jax.P(None, "tensor")}
    _check_traffic(engine)


@pytest.mark.slow
def test_what_attends_block_by_block_gives_what_one_device_gives():
    options = dataclasses.replace(OPTIONS, max_length=2 * attention.PROMPT_BLOCK)
    engine = _check_model(_config("expert", num_layers=5), options=options)
    _check_prompt_traffic(engine)


def test_weights_and_pools_are_split_and_stay_so(engine):
    """Every device holds its share of each matrix and of each pool, after serving too."""
    model, state = engine.model, engine._state
    matrices = [leaf for leaf in jax.tree.leaves((model.embedding_VD, model.block, model.first)) if leaf.ndim > 1]
    pools = jax.tree.leaves([(pool.keys, pool.values) for pool in state.cache.pools])
    for array in (*matrices, *pools):
        assert {shard.device for shard in array.addressable_shards} == set(jax.devices()[1 : 1 + SHARDS])
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // SHARDS}
    assert {array.sharding.spec for array in pools} == {jax.P(None, "tensor")}
    split = {id(array) for array in pools}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state) if id(leaf) not in split)


def test_a_step_sums_activations_and_moves_nothing_else(engine):
    _check_traffic(engine)


def _traffic(engine, program, *arguments, **static):
    with on_mesh(engine.model.mesh):
        text = program.lower(engine.model, *arguments, **static).compile().as_text()
    return collectives(parse(text), engine.model.shards)


def _check_traffic(engine):
    """Two sums per layer and one for the embedding; of the vocabulary one number per row and question."""
    model, shape, steps = engine.model, engine.shape, engine.shape.steps
    block, exits, shards = shape.block_slots, shape.exit_slots, model.shards
    found = _traffic(engine, dispatch, engine._state, empty_control(shape.places), shape=shape)
    summed, gathered = {}, []
    for item in found:
        assert item.kind in ("all-reduce", "all-gather")
        for operand in item.operands:
            if item.kind == "all-gather" and operand.elements > exits:
                gathered.append((operand.sizes, item.executions))
            elif operand.elements > exits:
                summed[operand.sizes] = summed.get(operand.sizes, 0) + item.executions
    edges = 0 if model.first is None else 4
    repeats = model.config.recursion.num_recursions if model.config.recursion.is_sequence else 1
    want = {(exits, 1, WIDTH): steps * (edges + 1)}
    want[block, 1, WIDTH] = want.get((block, 1, WIDTH), 0) + steps * 2 * len(model.block) * repeats
    assert summed == want
    # the branches of requests that cut the vocabulary, and of those that ask for more, need all of it
    assert gathered == [((exits, model.config.vocab_size // shards), steps)] * 3
    _check_prompt_traffic(engine)


def _check_prompt_traffic(engine):
    rows, chunk = engine.options.prefill_rows, engine.options.prefill_chunk
    arrays = (np.zeros(rows, np.int32), np.zeros((rows, chunk), np.int32), *np.zeros((3, rows), np.int32))
    for item in _traffic(engine, prefill, engine._state.cache, *arrays):
        assert item.kind == "all-reduce"
        assert {operand.sizes for operand in item.operands} == {(rows, chunk, WIDTH)}


def test_kernels_for_one_device_and_sizes_that_do_not_divide_are_refused():
    config = _config("vanilla", num_layers=1)
    _, several = _models(config)
    with pytest.raises(UserError, match=rf"backend='pallas' needs .* one device, not mesh.tensor={SHARDS}"):
        engine_shape(several, dataclasses.replace(OPTIONS, backend="pallas"))
    with pytest.raises(UserError, match=r"model.num_kv_heads=2 is not divisible by mesh.tensor=4"):
        _models(config, shards=4)

"""The engine gives every request what it would get alone, whatever else runs, and compiles nothing once warm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_examples import decode_model, full_forward, model_config
from engine_examples import LENGTH, OPTIONS, check_empty, check_greedy, make_requests, serve

from mor_jax.config import PartsConfig
from mor_jax.errors import UserError
from mor_jax.infer import engine as engine_module
from mor_jax.infer import prefill_chunk, stages
from mor_jax.infer.compilations import compilations
from mor_jax.infer.engine import Engine
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import Alternatives, Sampled, Sampling


@pytest.fixture(scope="module")
def config():
    return model_config("expert", "middle_cycle", "recursion")


@pytest.fixture(scope="module")
def engine(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prefill_chunk, "_LONG_TEXTS", LENGTH - 1
        )  # a text that nobody reads beside has a program of its own
        engine = Engine(decode_model(config), OPTIONS)
    engine.warm_up()
    return engine


def test_requests_at_random_times_get_what_they_get_alone(config, engine):
    requests = make_requests(40)
    before = compilations()
    results = serve(engine, requests)
    assert compilations() == before
    assert check_greedy(config, requests, results) == 0
    assert {t.depth for result in results for t in result} == {1, 2, 3}
    found, total = [result[0].found for result in results], engine.statistics
    assert total.preemptions > 8 and sum(found) > 20
    # those that lost their place read again
    assert total.found_tokens >= sum(found) and total.found_prefixes >= sum(n > 0 for n in found) > 3
    assert total.found_tokens + total.prompt_tokens > sum(len(request.prompt) - 1 for request in requests)


def test_nothing_stays_behind(engine):
    for token in engine.run():
        raise AssertionError(token)
    check_empty(engine)


def test_prompts_alone_are_read_without_dispatches(config, engine, monkeypatch):
    test_nothing_stays_behind(engine)
    engine.reset_statistics()
    programs, rows_of = [], engine_module.prompt_rows
    note = lambda texts, rows, *sizes: programs.append((len(texts), rows)) or rows_of(texts, rows, *sizes)  # noqa: E731
    monkeypatch.setattr(engine_module, "prompt_rows", note)
    request = Request(make_requests(1)[0].prompt[:1] * 22, 2)
    number = engine.submit(request)
    for nth in range(5):  # 21 tokens in chunks of 5
        assert engine.step() == [] and engine.statistics.prefills == nth + 1
    assert engine.statistics.dispatches == 0
    tokens = list(engine.run())
    assert [token.request for token in tokens] == [number] * 2 and engine.statistics.dispatches > 0
    assert check_greedy(config, [request], [tokens]) == 0
    # pages of what has ended are given back before others take them, and a prompt beside a running request still waits
    # for no one
    first = engine.submit(Request((3,), 20))
    engine.step()
    before = engine.statistics.dispatches
    engine.submit(request)
    engine.step()
    assert engine.statistics.dispatches == before + 1
    engine.cancel(first)
    assert {token.request for token in engine.run()} == {first + 1}
    assert set(programs) == {(1, 1)}
    test_nothing_stays_behind(engine)


def test_draws_depend_on_the_seed_alone(engine):
    fields = [Sampling(1.5, seed=7), Sampling(1.5, top_k=5, seed=7), Sampling(1.0, top_p=0.5, seed=9)]
    requests = [dataclasses.replace(r, sampling=fields[i % 3]) for i, r in enumerate(make_requests(12, seed=1))]
    together = serve(engine, requests, seed=3)
    alone = [serve(engine, [request])[0] for request in requests[:6]]
    for one, other in zip(alone, together, strict=False):
        assert [t.token for t in one] == [t.token for t in other]


def test_cancelled_requests_give_nothing_more_and_leave_nothing(engine):
    requests, got = make_requests(30, seed=2), {}
    numbers = [engine.submit(request) for request in requests]
    rng, cancelled = np.random.default_rng(0), set()
    while engine.busy:
        for token in engine.step():
            assert token.request not in cancelled
            got.setdefault(token.request, []).append(token)
        for number in rng.choice(numbers, 2):
            if len(cancelled) < 12 and not (got.get(number) and got[number][-1].finished):
                engine.cancel(int(number))
                cancelled.add(int(number))
    assert not engine.drain()
    assert len(cancelled) == 12
    for number, request in zip(numbers, requests, strict=True):
        if number not in cancelled:
            assert len(got[number]) == request.max_tokens
    test_nothing_stays_behind(engine)


def _log_softmax(logits_TV):
    logits_TV = logits_TV.astype(np.float64)
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))


def test_what_few_requests_ask_for_is_what_the_full_forward_pass_says(config, engine):
    """Bias, a least number of tokens, alternatives and scores of prompts, beside requests that ask for nothing."""
    bias = ((3, 2.0), (4, -100.0), (5, 1.5))
    asked = [
        {"sampling": Sampling(logit_bias=bias), "alternatives": 3},
        {"score_prompt": True, "alternatives": 20},
        {},
        {"stop_tokens": tuple(range(0, 31, 4)), "alternatives": 1},
        {"score_prompt": True, "max_depth": 2},
    ]
    requests = [dataclasses.replace(r, **asked[i % 5]) for i, r in enumerate(make_requests(25, seed=6))]
    requests = [dataclasses.replace(r, min_tokens=min(4, r.max_tokens)) if r.stop_tokens else r for r in requests]
    before = compilations()
    results = serve(engine, requests, seed=1)
    assert compilations() == before
    assert check_greedy(config, requests[2::5], results[2::5]) == 0
    for request, result in zip(requests, results, strict=True):
        whole, size = [*request.prompt, *(token.token for token in result)], len(request.prompt)
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(whole)] = whole
        says_TV = _log_softmax(np.asarray(full_forward(config, request.max_depth)(row)[0][0]))
        for nth, token in enumerate(result):
            chosen_V = says_TV[size - 1 + nth].copy()
            for biased, value in request.sampling.logit_bias:
                chosen_V[biased] += value
            if nth < request.min_tokens:
                chosen_V[list(request.stop_tokens)] = -np.inf
            assert token.token == chosen_V.argmax() and (token.prompt is not None) == (
                request.score_prompt and nth == 0
            )
            _check_ranked(says_TV[size - 1 + nth], token.alternatives, request.alternatives)
        assert len(result) >= request.min_tokens
        if request.score_prompt:
            found = result[0].prompt
            assert found is not None
            want_T = says_TV[np.arange(size - 1), request.prompt[1:]]
            np.testing.assert_allclose(found.log_probabilities, want_T, atol=1e-4, rtol=0)
            assert len(found.alternatives) == (size - 1 if request.alternatives else 0)
            for says_V, ranked in zip(says_TV, found.alternatives, strict=False):
                _check_ranked(says_V, ranked, request.alternatives)
    assert any(len(r) < q.max_tokens for r, q in zip(results, requests, strict=True) if q.stop_tokens)
    assert all(result[0].found == 0 for request, result in zip(requests, results, strict=True) if request.score_prompt)


def _check_ranked(says_V, ranked, count):
    assert [token for token, _ in ranked] == np.argsort(-says_V)[:count].tolist()
    np.testing.assert_allclose([value for _, value in ranked], np.sort(says_V)[::-1][:count], atol=1e-4, rtol=0)


def test_a_prompt_is_scored_without_a_token(engine):
    (request,) = make_requests(1, seed=9)
    (scored,) = serve(engine, [dataclasses.replace(request, max_tokens=0, score_prompt=True)])
    (longer,) = serve(engine, [dataclasses.replace(request, score_prompt=True)])
    assert [token.finished for token in scored] == [True] and scored[0].prompt == longer[0].prompt
    (full,) = serve(engine, [Request((1,) * LENGTH, 0, score_prompt=True)])
    assert full[0].prompt is not None and len(full[0].prompt.log_probabilities) == LENGTH - 1
    test_nothing_stays_behind(engine)


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_every_request_keeps_its_budget_of_passes_as_evaluation_does(routing, config, engine):
    if routing == "token":
        config = model_config("token", "cycle", "recursion")
        engine = Engine(decode_model(config), OPTIONS)
    requests = [dataclasses.replace(r, max_depth=1 + i % 2) for i, r in enumerate(make_requests(8, seed=4))]
    results = serve(engine, requests)
    for cap in (1, 2):
        assert check_greedy(config, requests[cap - 1 :: 2], results[cap - 1 :: 2], max_depth=cap) == 0
        assert max(t.depth for result in results[cap - 1 :: 2] for t in result) == cap


def test_a_stop_token_ends_a_request(engine):
    request = Request((3, 4), 20)
    (result,) = serve(engine, [request])
    third = result[2].token
    (stopped,) = serve(engine, [dataclasses.replace(request, stop_tokens=(third,))])
    first = next(i for i, t in enumerate(result) if t.token == third)
    assert [t.token for t in stopped] == [t.token for t in result[: first + 1]]
    assert stopped[-1].finished
    several = tuple({t.token for t in result[1:4]})
    (stopped,) = serve(engine, [dataclasses.replace(request, stop_tokens=several)])
    first = next(i for i, t in enumerate(result) if t.token in several)
    assert [t.token for t in stopped] == [t.token for t in result[: first + 1]] and stopped[-1].finished


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "the prompt holds no token"),
        (Request((1,), -1), "max_tokens=-1 must not be negative"),
        (Request((1, 99), 1), "prompt token 99 is outside 0..30"),
        (Request((1,) * 20, 5), "exceed max_length=24"),
        (Request((1,), 1, max_depth=0), "max_depth=0 must be at least 1"),
        (Request((1,), 1, stop_tokens=tuple(range(9))), "stop_tokens holds 9 tokens, more than 8"),
    ],
)
def test_what_can_never_be_served_is_refused(engine, request_, message):
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize("field", ["max_running", "max_length", "block_slots", "exit_slots", "exit_at", "block_pages"])
def test_a_size_of_zero_is_not_taken_for_a_default(field):
    with pytest.raises(UserError, match=f"{field}=0 must be positive"):
        dataclasses.replace(OPTIONS, **{field: 0})


def test_only_rows_that_leave_make_the_head_draw_or_cut(config, monkeypatch):
    """Free slots read the last place's request, which may be long over, and tokens that enter bring theirs."""
    seen = []
    monkeypatch.setattr(stages, "sample", lambda logits, rows, *_, **__: seen.append(rows) or _nothing(logits))
    engine = Engine(decode_model(config), OPTIONS)
    state, rows = engine._state, np.arange(3)
    cut = dataclasses.replace(state.requests.sampling, temperature_E=jnp.ones(engine.shape.places))
    state = dataclasses.replace(state, requests=dataclasses.replace(state.requests, sampling=cut))
    stages._leave(engine.model, state, state.cache.edge, jnp.asarray(rows), jnp.asarray(rows == 1), engine.shape)
    assert seen[0].temperature_E.tolist() == [0, 1, 0]


def _nothing(logits_EV):
    none_EK = jnp.zeros((len(logits_EV), 0))
    return Sampled(none_EK.sum(1).astype(jnp.int32), none_EK.sum(1), Alternatives(none_EK.astype(jnp.int32), none_EK))


def test_an_engine_without_cuts_refuses_them_and_draws_the_same(config, engine):
    without = Engine(decode_model(config), dataclasses.replace(OPTIONS, exit_at=1, cuts=False))
    for cut in (Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)):
        with pytest.raises(UserError, match=r"top_(k=3|p=0\.5) needs an engine with cuts=True"):
            without.submit(Request((1,), 1, cut))
    fields = [{}, {"sampling": Sampling(1.5, seed=7)}]
    requests = [dataclasses.replace(r, **fields[i % 2]) for i, r in enumerate(make_requests(8, seed=5))]
    for one, other in zip(serve(without, requests), serve(engine, requests), strict=True):
        assert [(t.token, t.depth) for t in one] == [(t.token, t.depth) for t in other]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routing", "sharing", "kv"),
    [
        ("expert-aux", "cycle", "shared"),
        ("token", "cycle", "recursion"),
        ("token-bias", "middle_cycle", "shared"),
        ("none", "middle_cycle", "recursion"),
        ("none", "middle_sequence", "shared"),
        ("none", "none", "recursion"),
        ("expert", "middle_cycle", "recursion-parts"),
        ("none", "none", "recursion-parts"),
    ],
)
def test_every_kind_of_model_runs_in_the_same_engine(routing, sharing, kv):
    parts = PartsConfig(qk_norm=True, value_residual=sharing == "none")
    kv, *with_parts = kv.split("-")
    config = model_config(routing, sharing, kv, **({"parts": parts} if with_parts else {}))
    engine = Engine(decode_model(config), dataclasses.replace(OPTIONS, block_pages=None, edge_pages=None))
    engine.warm_up()
    before, requests = compilations(), make_requests(40)
    results = serve(engine, requests)
    assert compilations() == before
    assert check_greedy(config, requests, results) == 0


def test_block_slots_are_full_while_requests_wait(config):
    options = dataclasses.replace(
        OPTIONS, max_running=9, block_slots=4, exit_slots=5, exit_at=5, staged=6, block_pages=None, edge_pages=None
    )
    engine = Engine(decode_model(config), options)
    for index in range(60):
        engine.submit(Request((index % 31,), 20))
    for _ in range(8):  # the first sequences come in
        engine.step()
    engine.reset_statistics()
    while engine.waiting:
        engine.step()
    total = engine.statistics
    assert total.block_used >= 0.9 * total.block_steps * engine.shape.block_slots
    for _ in engine.run():
        pass
    jax.block_until_ready(engine._state)

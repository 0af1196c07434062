"""Requests at random times for an engine of the tiny models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from decode_examples import full_forward, tokens

from mor_jax.config import ModelConfig
from mor_jax.infer.cache import kv_usage
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request, Token

LENGTH = 24
OPTIONS = EngineOptions(
    max_running=6,
    max_length=LENGTH,
    block_slots=4,
    exit_slots=3,
    exit_at=2,
    steps=4,
    page_size=4,
    prefill_rows=2,
    prefill_chunk=5,
    # few more than one sequence may need: requests wait for pages, and lose their places
    block_pages=24,
    edge_pages=9,
    kept=3,
)


def make_requests(count: int, seed: int = 0, **fields: Any) -> list[Request]:
    """Prompts and completions of all lengths that ``LENGTH`` allows; many begin as others do."""
    rng, common = np.random.default_rng(seed), tokens(2, LENGTH, seed=99)
    requests = []
    for i, length in enumerate(rng.integers(1, LENGTH, count)):
        prompt = tokens(1, int(length), seed=i)[0]
        shared = int(rng.integers(0, length + 1))
        prompt[:shared] = common[i % 2, :shared]
        requests.append(Request(tuple(prompt.tolist()), int(rng.integers(1, LENGTH - length + 1)), **fields))
    return requests


def check_empty(engine: Engine) -> None:
    """Nothing is held once the kept prefixes are forgotten, and the host's count of pages is the device's."""
    assert not engine.busy and not engine.drain()
    engine.step()  # gives the pages of the last sequences back
    check_books(engine)
    engine.forget_prefixes()
    usage, book = kv_usage(engine._state.cache), engine._places.book
    assert usage.used == usage.allocated == 0 and not any(book.used) and not book._holders
    assert not any(engine._places._most)
    for pool in engine._state.cache.pools:
        np.testing.assert_array_equal(np.sort(pool.free_P), np.arange(pool.free_P.shape[0]))
        assert not pool.extra_P.any()


def check_books(engine: Engine) -> None:
    """Between steps, when all has been looked at: rows hold what the host thinks, pages are free or held."""
    book = engine._places.book
    for nth, pool in enumerate(engine._state.cache.pools):
        assert int(pool.num_free) == pool.free_P.shape[0] - book.used[nth]
        for row in book._rows:
            assert pool.length_SG[row].tolist() == book.lengths(row)[nth]


def serve(engine: Any, requests: Sequence[Request], seed: int = 0) -> list[list[Token]]:
    """Submit requests at random times; return the tokens of each."""
    rng, left = np.random.default_rng(seed), list(requests)
    found: dict[int, list[Token]] = {}
    while left or engine.busy:
        for _ in range(int(rng.integers(0, 4))):
            if left:
                found[engine.submit(left.pop(0))] = []
        for token in engine.step():
            found[token.request].append(token)
    for token in engine.drain():
        found[token.request].append(token)
    return list(found.values())


def check_greedy(
    config: ModelConfig,
    requests: Sequence[Request],
    results: Sequence[Sequence[Token]],
    margin: float = 1e-4,
    max_depth: int | None = None,
) -> int:
    """Each token is the full forward pass's most likely one, with its log-probability and depth; count close calls."""
    close = 0
    for request, result in zip(requests, results, strict=True):
        assert len(result) == request.max_tokens
        assert [t.finished for t in result] == [False] * (len(result) - 1) + [True]
        close += check_tokens(config, request, result, margin, max_depth)
    return close


def check_tokens(
    config: ModelConfig,
    request: Request,
    result: Sequence[Token],
    margin: float = 1e-4,
    max_depth: int | None = None,
) -> int:
    """``check_greedy`` of one request that need not have come to its end."""
    close, row = 0, np.zeros((1, LENGTH), np.int32)
    whole = [*request.prompt, *(t.token for t in result)]
    row[0, : len(whole)] = whole
    logits_TV, depth_T = (np.asarray(x[0]) for x in full_forward(config, max_depth)(row))
    for nth, token in enumerate(result):
        place = len(request.prompt) - 1 + nth
        logits_V = logits_TV[place].astype(np.float64)
        log_probability = logits_V[token.token] - np.log(np.exp(logits_V).sum())
        np.testing.assert_allclose(token.log_probability, log_probability, atol=1e-4, rtol=0)
        assert token.depth == depth_T[place]
        if token.token != logits_V.argmax():
            assert logits_V.max() - logits_V[token.token] < margin
            close += 1
    return close

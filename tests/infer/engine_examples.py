"""Requests at random times for an engine of the tiny models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from decode_examples import tokens

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
    # too few for all places at once: requests must wait for pages
    block_pages=60,
    edge_pages=30,
)


def make_requests(count: int, seed: int = 0, **fields: Any) -> list[Request]:
    """Prompts and completions of all lengths that ``LENGTH`` allows."""
    rng = np.random.default_rng(seed)
    return [
        Request(tuple(tokens(1, int(length), seed=i)[0].tolist()), int(rng.integers(1, LENGTH - length + 1)), **fields)
        for i, length in enumerate(rng.integers(1, LENGTH, count))
    ]


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

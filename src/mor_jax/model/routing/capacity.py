"""How many tokens each recursion computes (paper section 2.2.1; facts of the release: k = max(1, int(c * S)))."""

import math

from mor_jax.config import ModelConfig


def _routed(capacity: float, length: int, multiple: int) -> int:
    tokens = max(1, int(capacity * length))
    return min(length, math.ceil(tokens / multiple) * multiple)


def routed_tokens(config: ModelConfig, length: int, step: int | None = None) -> tuple[int, ...]:
    """Tokens per row that expert-choice selects in each recursion.

    Args:
        config: model whose capacities, `capacity_multiple` and capacity warm-up apply.
        length: S, tokens per row.
        step: 0-based optimiser step; None is after every warm-up.

    Returns:
        k for each recursion, R integers, not ascending.
    """
    multiple = config.routing.capacity_multiple
    return tuple(_routed(c, length, multiple) for c in _warmed(config, step))


def _warmed(config: ModelConfig, step: int | None) -> tuple[float, ...]:
    total = config.routing.capacity_warmup_steps
    if step is None or total == 0:
        return config.capacities
    remaining = 0.5 * (1 + math.cos(math.pi * min(1.0, (step + 1) / total)))
    return tuple(c + (1 - c) * remaining for c in config.capacities)


def warmup_table(config: ModelConfig, length: int) -> list[tuple[int, ...]]:
    """Return [capacity_warmup_steps + 1][R]: k by step in double precision, the last row for every later step."""
    steps = [*range(config.routing.capacity_warmup_steps), None]
    return [routed_tokens(config, length, step) for step in steps]


def token_seats(config: ModelConfig, length: int) -> tuple[int, ...]:
    """Tokens per row that token-choice can seat in each recursion under `gather`, R integers; the first seats all.

    Custom capacities are taken as they are; the default ones, which a balanced router fills exactly, get
    `capacity_slack`.
    """
    routing = config.routing
    slack = 1.0 if routing.capacities is not None else routing.capacity_slack
    seats = [_routed(min(1.0, c * slack), length, routing.capacity_multiple) for c in config.capacities]
    return (length, *seats[1:])


def warmup_steps(config: ModelConfig) -> int:
    """Optimiser steps, from where routing enters, during which it changes with the step: `gather` cannot trace that."""
    routing = config.routing
    if routing.kind == "none":
        return 0
    own = routing.capacity_warmup_steps if routing.kind == "expert" else routing.balance_warmup_steps
    return max(own, routing.gate_warmup_steps)

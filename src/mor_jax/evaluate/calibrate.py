"""Boundaries of expert-choice from scores: what share of the tokens `threshold` lets pass becomes the capacities'.

The auxiliary loss trains the boundary 0, which need not let as many tokens pass as top-k does; a recipe without such a
loss has no boundary at all. Calibration puts the boundary of every recursion at the score that top-k cut at, over many
rows of training text. Nothing is trained. Letters: R recursions, B rows, T positions.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mor_jax.config import Config, PerfConfig
from mor_jax.errors import require
from mor_jax.evaluate.passes import batch_trace, evaluation_perf
from mor_jax.mesh.processes import to_host
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows


def calibrate(weights: Weights, perf: PerfConfig, batches: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return a boundary per recursion for ``model.routing.boundaries``.

    Args:
        weights: the model.
        perf: of its run; see ``evaluation_perf``.
        batches: packed rows, int32 [B, T+1] ``tokens``, ``segment_ids``, ``positions``; not the held-out text.

    Returns:
        R boundaries. Where the capacity is 1 it is 0 and of no effect.

    Raises:
        UserError: no expert-choice, a random selection, or an auxiliary router, whose scores decide instead.
    """
    routing = weights.config.routing
    require(routing.kind == "expert", f"boundaries belong to expert-choice, not routing.kind={routing.kind!r}")
    require(not routing.random, "random=True selects without regard to scores: no boundary can decide as it does")
    require(
        routing.sampling != "aux_router", "sampling='aux_router' decides by a second router, which is trained for it"
    )
    recursions = weights.config.recursion.num_recursions
    scores: list[list[np.ndarray]] = [[] for _ in range(recursions)]
    chosen = np.zeros(recursions, np.int64)
    for batch in batches:
        rows = Rows.of_batch(batch)
        trace = to_host(batch_trace(weights, evaluation_perf(perf), "topk", rows, jax.random.key(0)))
        counted_BT = np.asarray(rows.segment_ids_BT) > 0
        for r in range(recursions):
            active_BT = trace.active_RBT[r] & counted_BT
            scores[r].append(trace.scores_RBT[r][active_BT])
            chosen[r] += np.count_nonzero(trace.selected_RBT[r] & counted_BT)
    require(bool(scores[0]), "there is no text to calibrate on")
    cuts = [_cut(np.concatenate(found), count) for found, count in zip(scores, chosen.tolist(), strict=True)]
    return tuple(0.0 if c == 1.0 else cut for c, cut in zip(weights.config.capacities, cuts, strict=True))


def _cut(scores: np.ndarray, count: int) -> float:
    """Return the value halfway between the ``count`` highest scores and the rest."""
    ordered = np.sort(scores.astype(np.float64))
    first = len(ordered) - count
    if first == 0:
        return float(ordered[0])
    return float((ordered[first - 1] + ordered[first]) / 2)


def with_boundaries(config: Config, boundaries: tuple[float, ...]) -> Config:
    """Return a configuration whose `threshold` uses these boundaries."""
    routing = dataclasses.replace(config.model.routing, boundaries=boundaries)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, routing=routing))

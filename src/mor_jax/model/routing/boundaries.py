"""Boundaries of expert-choice: which raw score lets a token go on under `threshold`, and how training keeps them right.

Top-k (paper equation 2.1) looks ahead along the row, `threshold` compares a score with a number. The number that lets
as many tokens pass as top-k took is a quantile of the scores; training follows it, from batch to batch. Letters: B
rows, T positions, R recursions, X all tokens of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.model.routing.ranks import kth_highest, ordered, reaching, score_of

HORIZON = 8
"""Batches that a running boundary averages over (their mean age): enough to even out what batches differ by, and few
beside the steps over which a decaying rate lets the scores come to rest."""
LOWEST = -1e30
"""What is written for -inf: below every score, and short enough to be read back as it was printed."""


def boundary_refusal(config: ModelConfig, running_R: jax.Array | None = None) -> str | None:
    """Say why expert-choice has no boundary - calibrated, running, or trained -, or None if it has, or needs none.

    Args:
        config: the model.
        running_R: ``Weights.boundaries_R``.
    """
    routing = config.routing
    if routing.kind != "expert":
        return None
    if routing.random:
        return "model.routing.random=True selects without regard to scores: no boundary can decide as it does"
    if running_R is not None or routing.boundaries is not None or routing.sampling != "none":
        return None
    return (
        f"model.routing.sampling={routing.sampling!r} trains no causal boundary, model.routing.boundaries holds no "
        "calibrated one (`mor eval --calibrate` finds it), and the weights come without running ones"
    )


def boundaries_of(config: ModelConfig, running_R: jax.Array | None = None) -> jax.Array:
    """float32 [R]: the raw score from which expert-choice lets a token go on; -inf lets all.

    A calibrated boundary counts before a running one, and that before 0, which the auxiliary loss or router trained.

    Args:
        config: the model.
        running_R: ``Weights.boundaries_R``; NaN where there is none yet. Recursions that the model lacks are left out.
    """
    routing, recursions = config.routing, len(config.capacities)
    if routing.boundaries is not None:
        values_R = jnp.array(routing.boundaries, jnp.float32)
    elif routing.keeps_boundaries and running_R is not None:
        values_R = jnp.where(jnp.isnan(running_R), 0.0, running_R)[:recursions]
    else:
        values_R = jnp.zeros(recursions, jnp.float32)
    return jnp.where(jnp.array(config.capacities) == 1.0, -jnp.inf, values_R)


def printable(config: ModelConfig, boundaries_R: Any) -> jax.Array:
    """Return boundaries as JSON and `--boundaries` take them: finite, and 0 where the capacity is 1 (of no effect)."""
    return jnp.where(jnp.array(config.capacities) == 1.0, 0.0, jnp.nan_to_num(boundaries_R, neginf=LOWEST))


def listed(config: ModelConfig, running_R: jax.Array | None) -> list[float]:
    """Return what `threshold` compares with, ``printable``; on the host, so that one process of several may ask."""
    kept_R: Any = None if running_R is None else np.asarray(running_R)
    return printable(config, boundaries_of(config, kept_R)).tolist()


@jax.named_scope("routing")
def score_cut(scores_RX: jax.Array, chosen_R: jax.Array) -> jax.Array:
    """Return, per recursion, the score halfway between the ``chosen_R`` highest and the rest; -inf without a rest.

    Exact and without a sort (see ``ranks``): what a mesh exchanges is 15 R counts, eight times.

    Args:
        scores_RX: float32 [R, ...], -inf for tokens that the recursion could not choose.
        chosen_R: int32 [R], at least 1 wherever there are any.
    """
    return jax.vmap(_cut)(scores_RX, chosen_R)


def _cut(scores_X: jax.Array, chosen: jax.Array) -> jax.Array:
    keys_X = ordered(scores_X)
    key = kth_highest(keys_X, chosen)
    lowest, rest = jnp.squeeze(score_of(key)), jnp.max(jnp.where(keys_X < key, scores_X, -jnp.inf))
    return (lowest + jnp.where(jnp.squeeze(reaching(keys_X, key)) > chosen, lowest, rest)) / 2


def follow(boundaries_R: jax.Array, cut_R: jax.Array, step: jax.Array) -> jax.Array:
    """Move running boundaries by a batch's cuts: their mean, of the last ``HORIZON`` or so batches.

    Args:
        boundaries_R: before; NaN where there is none yet, which the first cut replaces.
        cut_R: of ``score_cut``. A batch whose tokens all went on (-inf) leaves a boundary as it is.
        step: 0-based optimiser step, counted from where routing enters.
    """
    rate = 1.0 / jnp.minimum(step + 1, HORIZON)  # at first a plain mean: no step weighs more
    moved_R = jnp.where(jnp.isfinite(boundaries_R), boundaries_R + rate * (cut_R - boundaries_R), cut_R)
    return jnp.where(jnp.isfinite(boundaries_R) & ~jnp.isfinite(cut_R), boundaries_R, moved_R)

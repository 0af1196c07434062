"""Calibrate expert-choice: boundaries with which wanted shares of held-out tokens reach each recursion.

The boundary 0 is what the auxiliary loss trains; where it misses the capacities, or nothing trained it, the quantile of
the scores does not. Recursion by recursion, since who reaches one depends on the boundaries before it.
Letters: B rows, T tokens, R recursions.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import require
from mor_jax.infer.cache import CacheShape, init_cache
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.prefill import prefill


@dataclass(frozen=True)
class Calibration:
    """Result of ``calibrate_boundaries``."""

    boundaries: tuple[float, ...]
    """For ``prepare_weights`` or ``routing.boundaries``; 0 where capacity 1 lets all pass."""
    shares: tuple[float, ...]
    """Of the tokens measured, those that completed each recursion."""


def calibrate_boundaries(
    model: DecodeModel, tokens_BT: np.ndarray, shares: Sequence[float] | None = None
) -> Calibration:
    """Find the boundaries of expert-choice.

    Args:
        model: any boundaries.
        tokens_BT: int32 held-out text, whole rows.
        shares: wanted share of all tokens per recursion, not ascending; None takes the capacities.

    Raises:
        UserError: the model is not expert-choice, or shares that do not fit it.
    """
    config = model.config
    require(config.routing.kind == "expert", f"routing.kind={config.routing.kind!r} has no boundary to calibrate")
    wanted = tuple(config.capacities if shares is None else shares)
    _check(wanted, config.capacities)
    bounds = np.full(len(wanted), -np.inf, np.float32)
    for recursion, share in enumerate(wanted):
        if config.capacities[recursion] == 1.0:
            continue
        score_RBT, depth_BT = _measure(model, bounds, tokens_BT)
        present = score_RBT[recursion][depth_BT > recursion]
        count = min(round(share * tokens_BT.size), present.size)
        if count < present.size:
            # between the last token that stays and the first that goes
            bounds[recursion] = np.sort(present)[present.size - count - 1 : present.size - count + 1].mean()
    _, depth_BT = _measure(model, bounds, tokens_BT)
    return Calibration(
        boundaries=tuple(0.0 if np.isneginf(b) else float(b) for b in bounds),
        shares=tuple(float(np.mean(depth_BT > r)) for r in range(len(wanted))),
    )


def _check(wanted: tuple[float, ...], capacities: tuple[float, ...]) -> None:
    require(len(wanted) == len(capacities), f"shares={wanted} has {len(wanted)} entries, not {len(capacities)}")
    descending = all(a >= b for a, b in itertools.pairwise(wanted))
    require(descending and wanted[-1] > 0, f"shares={wanted} must be positive and must not ascend")
    for share, capacity in zip(wanted, capacities, strict=True):
        require(
            capacity < 1 or share == 1, f"shares={wanted}: a recursion of capacity 1 lets all tokens pass, not {share}"
        )


def _measure(model: DecodeModel, bounds: np.ndarray, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and depths of all tokens under given boundaries; the boundaries are data, so this compiles once."""
    rows, length = tokens_BT.shape
    model = dataclasses.replace(model, boundary_R=jnp.asarray(bounds))
    cache = init_cache(model.config, CacheShape(sequences=rows, max_length=length))
    whole = jnp.arange(rows, dtype=jnp.int32)
    sizes = (jnp.zeros_like(whole), jnp.full_like(whole, length), jnp.full_like(whole, len(bounds)))
    _, output = prefill(model, cache, whole, jnp.asarray(tokens_BT, jnp.int32), *sizes, return_scores=True)
    score_RBT, depth_BT = jax.device_get((output.score_RBT, output.depth_BT))
    return score_RBT, depth_BT

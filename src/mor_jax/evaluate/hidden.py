"""How much every pass over the shared block changes the hidden states: size of the change and direction kept.

Letters: B rows, T positions, R recursions, D width.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.config import Mode, PerfConfig, ResolvedPerf
from mor_jax.errors import require
from mor_jax.evaluate.passes import evaluation_perf
from mor_jax.mesh.processes import to_host
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk


@struct.dataclass
class Changes:
    """Sums over the tokens that each recursion computed, [R]."""

    tokens: Any
    relative: Any
    """Of ||after - before|| / ||before||."""
    cosine: Any
    """Of the cosine between before and after."""


@partial(jax.jit, static_argnames=("perf", "mode"))
def _batch_changes(weights: Weights, perf: ResolvedPerf, mode: Mode, rows: Rows) -> Changes:
    output = apply_trunk(weights, perf, rows, mode=mode, return_stages=True)
    stages = output.stages
    assert stages is not None
    embedding = weights.params["embedding"]["embedding"]
    before = jnp.take(embedding, rows.tokens_BT, axis=0).astype(jnp.float32)
    before = before if stages.first is None else stages.first.astype(jnp.float32)
    sums = []
    for r, stage in enumerate(stages.recursions):
        computed_BT = rows.counted_BT if output.trace is None else output.trace.selected_RBT[r] & rows.counted_BT
        after = stage.astype(jnp.float32)
        sums.append(_sums(before, after, computed_BT))
        before = jnp.where(computed_BT[..., None], after, before)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *sums)


def _sums(before_BTD: jax.Array, after_BTD: jax.Array, computed_BT: jax.Array) -> Changes:
    def norm(x_BTD: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x_BTD), axis=-1) + 1e-12)

    dot_BT = jnp.sum(before_BTD * after_BTD, axis=-1)
    relative_BT = norm(after_BTD - before_BTD) / norm(before_BTD)
    cosine_BT = dot_BT / (norm(before_BTD) * norm(after_BTD))
    return Changes(
        tokens=jnp.sum(computed_BT),
        relative=jnp.sum(jnp.where(computed_BT, relative_BT, 0.0)),
        cosine=jnp.sum(jnp.where(computed_BT, cosine_BT, 0.0)),
    )


def hidden_changes(weights: Weights, perf: PerfConfig, batches: Iterable[Rows], mode: Mode) -> list[dict[str, float]]:
    """Measure how much each recursion changes the tokens that it computes.

    Args:
        weights: the model.
        perf: of its run; see ``evaluation_perf``.
        batches: text as model inputs.
        mode: selection mode.

    Returns:
        Per recursion ``tokens``, ``relative_change`` (mean of ||after - before|| / ||before||) and ``cosine``. Within
        token-choice, whose gate is applied on leaving, the states on the way are compared.

    Raises:
        UserError: the model repeats layers in place, so no pass over a whole block ends anywhere.
    """
    recursion, execution = weights.config.recursion, evaluation_perf(perf)
    require(not recursion.is_sequence, f"sharing={recursion.sharing!r} has no block passes")
    total: Any = None
    for rows in batches:
        sums = to_host(_batch_changes(weights, execution, mode, rows))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None
    recursions = zip(total.tokens, total.relative, total.cosine, strict=True)
    return [
        {"tokens": int(n), "relative_change": float(change) / max(n, 1), "cosine": float(cosine) / max(n, 1)}
        for n, change, cosine in recursions
    ]

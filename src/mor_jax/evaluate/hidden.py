"""How much every pass over the shared block changes the hidden states: size of the change and direction kept.

Letters: B rows, T positions, R recursions, D width.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.array_types import Params
from mor_jax.config import Config, ModelConfig, PerfConfig
from mor_jax.errors import require
from mor_jax.evaluate.passes import Mode
from mor_jax.mesh.processes import to_host
from mor_jax.model.transformer import apply_trunk


@struct.dataclass
class Changes:
    """Sums over the tokens that each recursion computed, [R]."""

    tokens: Any
    relative: Any
    """Of ||after - before|| / ||before||."""
    cosine: Any
    """Of the cosine between before and after."""


@cache
def _pass(model: ModelConfig, perf: PerfConfig, mode: Mode) -> Any:
    @jax.jit
    def run(params: Params, router_bias_R: Any, inputs: Any) -> Changes:
        output = apply_trunk(
            model,
            perf,
            params,
            inputs["tokens"],
            mode=mode,
            positions_BT=inputs["positions"],
            segment_ids_BT=inputs["segment_ids"],
            router_bias_R=router_bias_R,
            return_stages=True,
        )
        stages = output.stages
        assert stages is not None
        embedding = params["embedding"]["embedding"]
        before = jnp.take(embedding, inputs["tokens"], axis=0).astype(jnp.float32)
        before = before if stages.first is None else stages.first.astype(jnp.float32)
        counted_BT = inputs["segment_ids"] > 0
        sums = []
        for r, stage in enumerate(stages.recursions):
            computed_BT = counted_BT if output.trace is None else output.trace.selected_RBT[r] & counted_BT
            after = stage.astype(jnp.float32)
            sums.append(_sums(before, after, computed_BT))
            before = jnp.where(computed_BT[..., None], after, before)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *sums)

    return run


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


def hidden_changes(
    config: Config, params: Params, router_bias_R: jax.Array | None, batches: Iterable[Mapping[str, Any]], mode: Mode
) -> list[dict[str, float]]:
    """Measure how much each recursion changes the tokens that it computes.

    Args:
        config: of the run.
        params: parameter tree.
        router_bias_R: loss-free bias of token-choice, or None.
        batches: text as model inputs, int32 [B, T] ``tokens``, ``segment_ids``, ``positions``.
        mode: selection mode.

    Returns:
        Per recursion ``tokens``, ``relative_change`` (mean of ||after - before|| / ||before||) and ``cosine``. Within
        token-choice, whose gate is applied on leaving, the states on the way are compared.

    Raises:
        UserError: the model repeats layers in place, so no pass over a whole block ends anywhere.
    """
    require(not config.model.recursion.is_sequence, f"sharing={config.model.recursion.sharing!r} has no block passes")
    run = _pass(config.model, dataclasses.replace(config.perf, remat="none"), mode)
    total: Any = None
    for inputs in batches:
        sums = to_host(run(params, router_bias_R, dict(inputs)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None
    rows = zip(total.tokens, total.relative, total.cosine, strict=True)
    return [
        {"tokens": int(n), "relative_change": float(change) / max(n, 1), "cosine": float(cosine) / max(n, 1)}
        for n, change, cosine in rows
    ]

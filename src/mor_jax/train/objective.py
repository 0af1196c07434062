"""What a training step minimises: the loss of a (micro-)batch and its parts (paper section 3 and appendix B).

Letters: A micro-batches, B rows of the whole batch, T positions, R recursions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.array_types import Params
from mor_jax.config import Config, ResolvedPerf
from mor_jax.mesh.axes import constrain
from mor_jax.model.loss import batch_labels, fused_cross_entropy
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.routing.losses import RoutingLosses, RoutingStatistics
from mor_jax.model.routing.trace import RoutingTrace
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

Batch = Mapping[str, jax.Array]
"""int32 [B, T+1] arrays `tokens`, `segment_ids` (1-based, 0 = padding), `positions` (restarting per document) and, if
others than the next tokens are to be predicted, `labels` (see ``batch_labels``)."""
ARRAYS = ("tokens", "segment_ids", "positions")
"""Arrays that every batch has."""


@struct.dataclass
class LossParts:
    """What the loss of a (micro-)batch is made of.

    Adds up over micro-batches to the figures of the whole batch, but for the scores, which are laid side by side.
    """

    lm: jax.Array
    """Summed negative log-likelihood over the target tokens of the whole batch, in nats per token."""
    logit_z: jax.Array
    """Summed squared log-sum-exp of the logits over the same tokens."""
    total: jax.Array
    """What is minimised: lm + weighted router losses + logit z-loss, without the auxiliary router's."""
    losses: RoutingLosses | None
    """Unweighted router losses / A; None without a router."""
    statistics: RoutingStatistics | None
    """Routing statistics / A; None without a router."""
    chosen_R: jax.Array | None = None
    """int32 [R]: tokens that each recursion took; None unless ``routing.keeps_boundaries``."""
    scores_RBT: jax.Array | None = None
    """float32: raw scores of the tokens that each recursion could choose, -inf for others; None likewise."""


def step_arrays(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which arrays of a batch a training step reads; a dataset may give more."""
    return (*ARRAYS, "labels") if "labels" in batch else ARRAYS


def count_targets(config: Config, batch: Batch) -> jax.Array:
    """Return how many targets of the batch count, float32 scalar."""
    return jnp.sum(batch_labels(config.model, batch)[1], dtype=jnp.float32)


def loss_fn(
    config: Config,
    params: Params,
    router_bias_R: jax.Array,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | None,
    *,
    boundaries_R: jax.Array | None = None,
    perf: ResolvedPerf | None = None,
    targets: jax.Array | None = None,
    micro_batches: int = 1,
) -> tuple[jax.Array, LossParts]:
    """Compute the training loss of a batch, or of one micro-batch as its share of the whole batch's loss.

    The language-model loss is a sum divided by the target tokens of the whole batch, so micro-batches add up to the
    big batch exactly. Router losses are means over a micro-batch, averaged over micro-batches: equal to the big batch
    when every row counts as many active tokens, except token-choice's balancing loss, which multiplies two means and
    therefore is defined per micro-batch.

    Args:
        config: model, routing coefficients, ``train.logit_z_loss`` and ``perf``.
        params: parameter tree.
        router_bias_R: float32 [R], token-choice's loss-free bias.
        batch: see ``Batch``.
        key: random key of a random router.
        step: int32 scalar, 0-based optimiser step that drives the warm-ups of routing, counted from where routing
            enters; None is after them.
        boundaries_R: float32 [R], running boundaries of expert-choice, for the statistics; None is none.
        perf: how to execute the model; None is ``config.perf``, plainly where it leaves something open.
        targets: target tokens of the whole batch; None counts this one's.
        micro_batches: how many micro-batches the whole batch has.

    Returns:
        (loss to differentiate, parts). The first is ``parts.total`` plus the auxiliary router's loss, whose gradient
        reaches `aux_router` only.
    """
    model, routing = config.model, config.model.routing
    perf = config.perf.resolved() if perf is None else perf
    targets = count_targets(config, batch) if targets is None else targets
    weights, rows = Weights(model, params, router_bias_R, boundaries_R), Rows.of_batch(batch)
    output = apply_trunk(weights, perf, rows, step=step, key=key)
    labels_BT, counted_BT = batch_labels(model, batch)
    entropy = fused_cross_entropy(
        output.hidden_BTD,
        head_matrix(model, params),
        constrain(labels_BT, "batch", None),  # rows are whole: no border to shift targets across
        constrain(counted_BT.astype(jnp.float32), "batch", None),
        chunk=perf.loss_chunk,
        z_coefficient=config.train.logit_z_loss,
        logits_dtype=perf.logits_dtype,
        fused=perf.fused,
    )
    scale = 1.0 / jnp.maximum(targets, 1.0)
    total = entropy.loss_sum * scale
    lm, logit_z = entropy.nll_sum * scale, entropy.z_sum * scale
    if output.trace is None:
        return total, LossParts(lm=lm, logit_z=logit_z, total=total, losses=None, statistics=None)
    losses, statistics = jax.tree.map(lambda x: x / micro_batches, (output.trace.losses, output.trace.statistics))
    total += routing.sampling_coefficient * losses.sampling
    total += routing.balancing_coefficient * losses.balancing
    total += routing.z_loss_coefficient * losses.router_z
    parts = LossParts(lm=lm, logit_z=logit_z, total=total, losses=losses, statistics=statistics)
    if routing.keeps_boundaries:
        parts = _with_scores(parts, output.trace, rows.counted_BT)
    return total + losses.aux_router, parts


def _with_scores(parts: LossParts, trace: RoutingTrace, counted_BT: jax.Array) -> LossParts:
    """Add what the boundaries follow: the scores that competed, and how many tokens won."""
    chosen_R = jnp.sum(trace.selected_RBT & counted_BT[None], axis=(1, 2), dtype=jnp.int32)
    scores_RBT = jnp.where(trace.active_RBT & counted_BT[None], trace.scores_RBT, -jnp.inf)
    return dataclasses.replace(parts, chosen_R=chosen_R, scores_RBT=jax.lax.stop_gradient(scores_RBT))

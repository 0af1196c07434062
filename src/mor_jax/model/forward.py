"""One call for a notebook: logits, losses, hidden states and routing of a batch (paper section 2)."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jax.typing import ArrayLike

from mor_jax.array_types import Params
from mor_jax.config import Execution, Mode, ModelConfig, ResolvedPerf
from mor_jax.errors import require
from mor_jax.model.loss import IGNORED, target_mask
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.routing.capacity import routed_tokens
from mor_jax.model.routing.trace import RoutingTrace
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import Stages, apply_trunk


@struct.dataclass
class ModelOutput:
    """What one forward pass gives."""

    logits: jax.Array
    """float32 [B, T, V]."""
    losses: dict[str, jax.Array]
    """float32 scalars: `lm` and `total`, and those that apply of `sampling`, `balancing`, `router_z` (unweighted)."""
    hidden: Stages | None
    """Hidden states on the way, if asked for."""
    trace: RoutingTrace | None
    """Where every token went; None without a router. Expert-choice by `topk` has ``trace.selected`` unless the step is
    traced (then k is no static shape)."""


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    mode: Mode = "topk",
    train: bool = False,
    step: int | jax.Array | None = None,
    attention_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    loss_normalizer: float | jax.Array | None = None,
    return_hidden: bool = False,
    execution: Execution | None = None,
) -> ModelOutput:
    """Run a model on whole rows of tokens. Differentiable in ``params``; holds the logits [B, T, V].

    Args:
        config: the model.
        params: float32 parameter tree; may carry ``router_state`` (see ``split_router_state``).
        tokens_BT: int32 token ids.
        labels: int32 [B, T], not shifted: position t predicts label t+1; -100 is not predicted. Default: the tokens.
        mode: expert-choice selection: `topk` looks ahead along the sequence, `threshold` is causal.
        train: whether the warm-ups of routing apply; otherwise they count as finished.
        step: 1-based training step that drives the warm-ups; None is after them.
        attention_mask: [B, T]; nothing attends to tokens with 0, which route like any other (as released).
        segment_ids: int32 document numbers from 1; 0 is padding, which takes no part in anything.
        positions: int32 places in the documents, which ``rotary_positions='document'`` uses; default is one document
            per row.
        loss_normalizer: divides the summed cross-entropy, and scales router_z and balancing by B * T over it.
            Default: the number of targets.
        return_hidden: whether to return the hidden states on the way.
        execution: `gather` (the default) or `scan`.

    Returns:
        ``ModelOutput``. ``losses["total"]`` is lm plus the weighted router losses, without an auxiliary router's
        loss: that is ``losses["sampling"]``, whose gradient reaches ``aux_router`` only.

    Raises:
        UserError: shapes that disagree, a step below 1, or what ``apply_trunk`` refuses.

    References:
        Bae et al., Mixture-of-Recursions (2025), sections 2.2.1 and 3.3; the released trainer for the normaliser.
    """
    tokens_BT = jnp.asarray(tokens_BT)
    labels_BT, mask_BT, segments_BT, positions_BT = (
        None if rows is None else jnp.asarray(rows) for rows in (labels, attention_mask, segment_ids, positions)
    )
    given = {"labels": labels_BT, "attention_mask": mask_BT, "segment_ids": segments_BT, "positions": positions_BT}
    _check_arguments(tokens_BT, given, execution)
    require(
        segments_BT is None or positions_BT is not None or config.rotary_positions == "row",
        "segment_ids without positions: rotary_positions='document' counts the places in each document",
    )
    weights = Weights.of_tree(config, jax.tree.map(jnp.asarray, params))
    zero_based_step = _zero_based(step) if train else None
    rows = Rows(tokens_BT, positions_BT, segments_BT, mask_BT)
    perf = ResolvedPerf(execution=execution or "gather")
    output = apply_trunk(weights, perf, rows, mode=mode, step=zero_based_step, return_stages=return_hidden)
    trace = _with_selected(config, output.trace, tokens_BT.shape[1], mode, zero_based_step)
    head_VD = head_matrix(config, weights.params).astype(output.hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", output.hidden_BTD, head_VD, preferred_element_type=jnp.float32)
    targets_BT = _targets(config, tokens_BT if labels_BT is None else labels_BT, segments_BT)
    losses = _losses(config, logits_BTV, targets_BT, trace, loss_normalizer)
    return ModelOutput(logits=logits_BTV, losses=losses, hidden=output.stages, trace=trace)


def _check_arguments(tokens_BT: jax.Array, given: dict[str, jax.Array | None], execution: Execution | None) -> None:
    require(tokens_BT.ndim == 2, f"tokens_BT has shape {tokens_BT.shape}, but must be [B, T]")
    for name, value in given.items():
        require(
            value is None or value.shape == tokens_BT.shape,
            f"{name} has shape {getattr(value, 'shape', None)}, but the tokens have {tokens_BT.shape}",
        )
    choices = get_args(Execution)
    require(
        execution is None or execution in choices,
        f"execution={execution!r} is not one of {', '.join(map(repr, choices))}",
    )


def _zero_based(step: int | jax.Array | None) -> int | jax.Array | None:
    """A concrete step becomes an int, which keeps the shapes of `gather` static."""
    if step is None or isinstance(step, Tracer):
        return None if step is None else step - 1
    require(int(step) >= 1, f"step={int(step)} must be at least 1: it counts training steps from 1")
    return int(step) - 1


def _with_selected(
    config: ModelConfig, trace: RoutingTrace | None, length: int, mode: Mode, step: int | jax.Array | None
) -> RoutingTrace | None:
    """Add the positions that top-k selected, which `scan` knows only as a mask."""
    if trace is None or trace.selected is not None or config.routing.kind != "expert" or mode != "topk":
        return trace
    if step is not None and not isinstance(step, int):
        return trace
    counts = routed_tokens(config, length, step)
    rows = (jnp.argsort(~m, axis=1, stable=True)[:, :k] for m, k in zip(trace.selected_RBT, counts, strict=True))
    return dataclasses.replace(trace, selected=tuple(rows))


def _targets(config: ModelConfig, labels_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Labels shifted by one: int32 [B, T-1], -100 where nothing is predicted."""
    targets_BT = labels_BT[:, 1:]
    return targets_BT if segment_ids_BT is None else jnp.where(target_mask(config, segment_ids_BT), targets_BT, IGNORED)


def _losses(
    config: ModelConfig,
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    trace: RoutingTrace | None,
    normalizer: float | jax.Array | None,
) -> dict[str, jax.Array]:
    counted_BT = targets_BT != IGNORED
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    picked_BT1 = jnp.take_along_axis(log_probs_BTV, jnp.where(counted_BT, targets_BT, 0)[..., None], axis=-1)
    nll_sum = -jnp.sum(picked_BT1[..., 0] * counted_BT)
    if normalizer is None:
        normalizer = jnp.maximum(jnp.sum(counted_BT), 1)
    losses = {"lm": nll_sum / normalizer}
    total = losses["lm"]
    routing = config.routing
    if trace is not None:
        scale = logits_BTV.shape[0] * logits_BTV.shape[1] / normalizer
        if routing.kind == "expert" and routing.sampling == "aux_loss":
            losses["sampling"] = trace.losses.sampling
            total += routing.sampling_coefficient * losses["sampling"]
        if routing.has_aux_router:
            losses["sampling"] = trace.losses.aux_router
        if routing.kind == "token" and routing.balancing == "loss":
            losses["balancing"] = trace.losses.balancing * scale
            total += routing.balancing_coefficient * losses["balancing"]
        if routing.z_loss_coefficient > 0:
            losses["router_z"] = trace.losses.router_z * scale
            total += routing.z_loss_coefficient * losses["router_z"]
    return losses | {"total": total}

"""Evaluation passes over rows of tokens, compiled once per (model, execution, selection mode) and shape.

Letters: B rows, T positions, R recursions, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from mor_jax.array_types import Params
from mor_jax.config import PLAIN, Mode, PerfConfig, ResolvedPerf
from mor_jax.evaluate.text_bytes import target_bytes
from mor_jax.mesh.mesh import batch_sharding, batch_shards
from mor_jax.model.loss import batch_labels, token_nll
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.routing.trace import RoutingTrace
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

Arrays = TypeVar("Arrays")

MODE_NOTES: dict[Mode, str] = {
    "topk": "looks ahead: the training selection, which compares a token with later ones",
    "threshold": "causal: the selection that generation uses",
}


class Tokenizer(Protocol):
    """What evaluation needs of a tokenizer."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def token_bytes(self, token: int, /) -> bytes:
        """Return the bytes that one token stands for."""
        ...


@struct.dataclass
class RoutingTotals:
    """What the router did with the input tokens of one batch (padding left out)."""

    depth_counts: jax.Array
    """int32 [R+1]: tokens that completed 0, 1, ..., R passes."""
    active_R: jax.Array
    """int32 [R]: tokens that recursion r could choose."""
    agreed_R: jax.Array
    """float32 [R]: of these, tokens that the causal boundary decides as the selection did."""
    used_T: jax.Array
    """bool [T]: whether any row's token at this position was computed by the last recursion."""
    dropped: jax.Array
    """float32: tokens that found no seat (token-choice under `gather`)."""


@struct.dataclass
class BatchTotals:
    """Sums over one batch; they add up to exact figures over many."""

    nll_sum: jax.Array
    """float32: nats over the target tokens."""
    tokens: jax.Array
    """int32: target tokens."""
    bytes: jax.Array
    """int32: bytes of the target tokens."""
    routing: RoutingTotals | None
    """None without a router."""


def evaluation_perf(asked: PerfConfig) -> ResolvedPerf:
    """How evaluation executes a model: as asked, and plainly where that leaves something open.

    Nothing is differentiated, so nothing is rematerialised; whether a whole block fits is the train step's estimate.
    """
    return dataclasses.replace(asked.resolved(dataclasses.replace(PLAIN, whole_block=False)), remat="none")


def spread(params: Params, batch: Arrays) -> Arrays:
    """Split a batch's rows over the mesh that the parameters lie on, where they divide; every process passes all rows.

    Args:
        params: parameter tree.
        batch: a tree of numpy arrays [B, ...], the same in every process.

    Returns:
        The batch as global arrays; as it came for parameters without a mesh, or rows that its devices cannot share.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return batch
    rows = batch_sharding(sharding.mesh)
    if any(len(x) % batch_shards(sharding.mesh) for x in jax.tree.leaves(batch)):
        return batch
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, x.__getitem__), batch)


def _routing_totals(trace: RoutingTrace, counted_BT: jax.Array) -> RoutingTotals:
    active_R = jnp.sum(trace.active_RBT & counted_BT[None], axis=(1, 2), dtype=jnp.int32)
    depths = jnp.arange(trace.active_RBT.shape[0] + 1)
    at_depth_DBT = (trace.depth_BT[None] == depths[:, None, None]) & counted_BT[None]
    return RoutingTotals(
        depth_counts=jnp.sum(at_depth_DBT, axis=(1, 2), dtype=jnp.int32),
        active_R=active_R,
        agreed_R=trace.statistics.threshold_accuracy_R * active_R,
        used_T=jnp.any(trace.selected_RBT[-1] & counted_BT, axis=0),
        dropped=trace.statistics.dropped * jnp.sum(counted_BT),
    )


@partial(jax.jit, static_argnames=("perf", "mode", "within_documents"))
def batch_totals(
    weights: Weights,
    perf: ResolvedPerf,
    mode: Mode,
    batch: Mapping[str, jax.Array],
    lengths_2V: jax.Array,
    key: jax.Array,
    *,
    within_documents: bool = False,
) -> BatchTotals:
    """Measure a packed batch.

    Args:
        weights: the model.
        perf: of ``evaluation_perf``.
        mode: selection mode.
        batch: int32 [B, T+1] arrays ``tokens``, ``segment_ids``, ``positions`` and, if it has them, ``labels``.
        lengths_2V: of ``token_lengths``.
        key: of a random router.
        within_documents: see ``target_mask``.
    """
    labels_BT, counted_BT = batch_labels(weights.config, batch, within_documents=within_documents)
    output = apply_trunk(weights, perf, Rows.of_batch(batch), mode=mode, key=key)
    head_VD = head_matrix(weights.config, weights.params)
    nll_BT = token_nll(output.hidden_BTD, head_VD, labels_BT, chunk=perf.loss_chunk)
    bytes_BT = target_bytes(lengths_2V, batch["tokens"], batch["positions"])
    trace, routed_BT = output.trace, batch["segment_ids"][:, :-1] > 0
    return BatchTotals(
        nll_sum=jnp.sum(jnp.where(counted_BT, nll_BT, 0.0)),
        tokens=jnp.sum(counted_BT, dtype=jnp.int32),
        bytes=jnp.sum(jnp.where(counted_BT, bytes_BT, 0), dtype=jnp.int32),
        routing=None if trace is None else _routing_totals(trace, routed_BT),
    )


@partial(jax.jit, static_argnames=("perf", "mode"))
def batch_trace(weights: Weights, perf: ResolvedPerf, mode: Mode, rows: Rows, key: jax.Array) -> RoutingTrace | None:
    """Route rows; None without a router. The arguments are those of ``batch_totals``."""
    return apply_trunk(weights, perf, rows, mode=mode, key=key).trace

"""Where the heads of every pass over the shared block look: entropy, distance, share on the first token and on itself.

The layers of a pass are run one by one from the states that the trunk had before it, so that every pass and layer gives
its own figures although they share their weights. Letters: B rows, T queries, S keys, R recursions, L layers in the
block, N heads, K kv heads, G = N/K, H head width.
"""

import dataclasses
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
from mor_jax.model.decoder_layer import DecoderLayer
from mor_jax.model.layer_context import LayerContext, Stream
from mor_jax.model.modern_parts import first_values
from mor_jax.model.parameters import Weights, compute_copy, from_tree
from mor_jax.model.recurse import at, empty_kv, scan_context
from mor_jax.model.relaxation import collect_unshared
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

FIGURES = ("entropy", "distance", "first", "itself")
"""Of a head's attention: nats; tokens back; share on the first visible token; share on the token itself."""


@struct.dataclass
class AttentionSums:
    """Sums over the queries that a pass computed and that see two keys or more."""

    queries_R: Any
    keys_R: Any
    """Of the visible keys per query."""
    figures_RLN: dict[str, Any]
    """By name of FIGURES."""


@partial(jax.jit, static_argnames=("perf", "mode"))
def _batch_sums(weights: Weights, perf: ResolvedPerf, mode: Mode, rows: Rows) -> AttentionSums:
    output = apply_trunk(weights, perf, rows, mode=mode, return_stages=True)
    stages, trace = output.stages, output.trace
    assert stages is not None
    embedding = weights.params["embedding"]["embedding"]
    embedded = jnp.take(embedding, rows.tokens_BT, axis=0).astype(weights.config.dtype)
    before = embedded if stages.first is None else stages.first
    passes, counted_BT = _Passes(weights, perf, rows, embedded), rows.counted_BT
    for r, stage in enumerate(stages.recursions):
        computed_BT = jnp.ones_like(counted_BT) if trace is None else trace.selected_RBT[r]
        passes.run(r, before, None if trace is None else computed_BT)
        before = jnp.where((computed_BT & counted_BT)[..., None], stage.astype(before.dtype), before)
    return passes.sums()


class _Passes:
    """Passes over the block, layer by layer, with what their heads did."""

    def __init__(self, weights: Weights, perf: ResolvedPerf, rows: Rows, embedded_BTD: jax.Array) -> None:
        self.model = model = weights.config
        self.view, self.counted_BT = rows.view(model), rows.counted_BT
        params: Any = compute_copy(model, weights.params)
        self.block = params["block"]
        self.unshared = collect_unshared(model, lambda module, name: module(model).apply({"params": params[name]}))
        trunk = from_tree(params)["params"]
        self.first_values_BTX = first_values(model, trunk, embedded_BTD)
        self.layer = DecoderLayer(model, perf)
        self.first: list[Any] = []
        """Keys and values of the first pass by layer, where later passes read them."""
        self.found: list[tuple[Any, Any, list[dict[str, Any]]]] = []

    def run(self, r: int, x_BTD: jax.Array, selected_BT: jax.Array | None) -> None:
        """Run pass ``r`` on the states before it; ``selected_BT`` are the tokens that it computes, None is all."""
        model = self.model
        shares = model.recursion.kv_strategy != "recursion"
        empty = jax.tree.map(lambda a_LBTKH: a_LBTKH[0], empty_kv(model, x_BTD)) if shares else None
        selected = jnp.ones_like(self.counted_BT) if selected_BT is None else selected_BT
        fresh_BT = jnp.full_like(selected, r == 0)
        if model.recursion.kv_strategy == "shared_update":
            fresh_BT = fresh_BT | selected
        context = scan_context(model, self.view, empty, fresh_BT, selected_BT)
        mask_BTS = context.mask.dense()[:, 0]
        visible_BT = jnp.sum(mask_BTS, axis=-1)
        counts_BT = selected & self.counted_BT & (visible_BT > 1)
        heads: list[dict[str, Any]] = []

        def observe(query_BTNH: jax.Array, keys_BSKH: jax.Array) -> None:
            heads.append(_head_sums(query_BTNH, keys_BSKH, mask_BTS, counts_BT))

        context = dataclasses.replace(context, observe=observe, first_values_BCX=self.first_values_BTX)
        for layer in range(model.block_depth):
            x_BTD, kv = self._layer(r, layer, x_BTD, context, empty if r == 0 else None)
            if shares and r == 0:
                self.first.append(kv)
        self.found.append((jnp.sum(counts_BT), jnp.sum(jnp.where(counts_BT, visible_BT, 0)), heads))

    def _layer(self, r: int, layer: int, x_BTD: jax.Array, context: LayerContext, empty: Any) -> tuple[Any, Any]:
        cached = empty if empty is not None or not self.first else self.first[layer]
        unshared = at(at(self.unshared, r), layer)
        params = {"params": at(self.block, layer)}
        out: Any = self.layer.apply(params, Stream(x_BTD), context, cached, unshared)
        return out[0].x_BCD, out[1]

    def sums(self) -> AttentionSums:
        """Return the sums of all passes."""
        queries, keys, heads = zip(*self.found, strict=True)
        by_layer = [jax.tree.map(lambda *a_N: jnp.stack(a_N), *layers) for layers in heads]
        figures = jax.tree.map(lambda *a_LN: jnp.stack(a_LN), *by_layer)
        return AttentionSums(queries_R=jnp.stack(queries), keys_R=jnp.stack(keys), figures_RLN=figures)


def _head_sums(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, mask_BTS: jax.Array, counts_BT: jax.Array
) -> dict[str, jax.Array]:
    """Sum FIGURES over the queries that count, [N] each; row by row, since the weights [N, T, S] are large."""

    def of_row(row: Any) -> dict[str, jax.Array]:
        query_TNH, keys_SKH, mask_TS, counts_T = row
        length, heads, width = query_TNH.shape
        grouped_TKGH = query_TNH.reshape(length, keys_SKH.shape[1], -1, width).astype(jnp.float32)
        scores = jnp.einsum("TKGH,SKH->KGTS", grouped_TKGH, keys_SKH.astype(jnp.float32)) * width**-0.5
        seen_1TS, counts_1T = mask_TS[None], counts_T[None]
        scores_NTS = jnp.where(seen_1TS, scores.reshape(heads, length, -1), -jnp.inf)
        log_NTS = jax.nn.log_softmax(jnp.where(counts_1T[..., None], scores_NTS, 0.0), axis=-1)
        weights_NTS = jnp.exp(log_NTS)
        back_1TS = (jnp.arange(length)[:, None] - jnp.arange(mask_TS.shape[1])[None, :])[None]
        first_1T1 = jnp.argmax(seen_1TS, axis=-1)[..., None]
        by_query = {
            "entropy": -jnp.sum(jnp.where(seen_1TS, weights_NTS * log_NTS, 0.0), axis=-1),
            "distance": jnp.sum(jnp.where(seen_1TS, weights_NTS * back_1TS, 0.0), axis=-1),
            "first": jnp.take_along_axis(weights_NTS, first_1T1, axis=-1)[..., 0],
            "itself": jnp.diagonal(weights_NTS, axis1=1, axis2=2),
        }
        return {name: jnp.sum(jnp.where(counts_1T, figure_NT, 0.0), axis=-1) for name, figure_NT in by_query.items()}

    rows = jax.lax.map(of_row, (query_BTNH, keys_BSKH, mask_BTS, counts_BT))
    return jax.tree.map(lambda a_BN: jnp.sum(a_BN, axis=0), rows)


def attention_by_pass(weights: Weights, perf: PerfConfig, batches: Iterable[Rows], mode: Mode) -> list[dict[str, Any]]:
    """Measure what the heads of every pass attend to.

    Args:
        weights: the model.
        perf: of its run; see ``evaluation_perf``.
        batches: text as model inputs.
        mode: selection mode.

    Returns:
        Per pass ``queries`` (that it computed, and that see two keys or more), ``keys`` (visible ones per query, on
        average) and ``layers``: for every layer of the block, by name of FIGURES, the mean of each head. Entropy is at
        most log ``keys``. A model without shared layers has one pass, of all its layers.

    Raises:
        UserError: the model repeats layers in place, so it makes no passes over a block.
    """
    model = weights.config
    require(not model.recursion.is_sequence, f"sharing={model.recursion.sharing!r} has no block passes")
    plain = dataclasses.replace(evaluation_perf(perf), attention_backend="xla", fusion="xla")
    total: Any = None
    for rows in batches:
        sums = to_host(_batch_sums(weights, plain, mode, rows))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None
    passes = []
    for r, count in enumerate(total.queries_R):
        n = max(float(count), 1.0)
        layers = [
            {name: (total.figures_RLN[name][r, layer] / n).tolist() for name in FIGURES}
            for layer in range(model.block_depth)
        ]
        passes.append({"queries": int(count), "keys": float(total.keys_R[r]) / n, "layers": layers})
    return passes

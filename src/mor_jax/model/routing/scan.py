"""Execution `scan`: `nn.scan` over recursions, full-length tensors, per-token depth masks (paper equations 2.1, 2.2).

The reference semantics: nothing is dropped, k may be a traced number (warm-ups), and `threshold` needs no capacity.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.array_types import KeyValue
from mor_jax.config import Mode, ModelConfig
from mor_jax.model.recurse import empty_kv, run_block, scan_context
from mor_jax.model.relaxation import Unshared
from mor_jax.model.routing.capacity import routed_tokens, warmup_table
from mor_jax.model.routing.decide import RoutingInputs, choose_depth, expert_scores
from mor_jax.model.routing.router import gated, score
from mor_jax.model.routing.select import top_mask
from mor_jax.model.routing.trace import RoutingTrace, expert_trace, token_trace

Routed = tuple[jax.Array, RoutingTrace, tuple[jax.Array, ...]]


def _counts(config: ModelConfig, length: int, step: int | jax.Array | None) -> jax.Array:
    """int32 [R]: tokens to select, also for a traced step."""
    if step is None or isinstance(step, int):
        return jnp.array(routed_tokens(config, length, step), jnp.int32)
    table = jnp.asarray(np.array(warmup_table(config, length), np.int32))
    return table[jnp.minimum(step, len(table) - 1)]


def _fresh(config: ModelConfig, r: jax.Array, selected_BT: jax.Array) -> jax.Array:
    """bool [B, T]: rows whose keys and values this recursion computes anew."""
    first = jnp.broadcast_to(r == 0, selected_BT.shape)
    return first | selected_BT if config.recursion.kv_strategy == "shared_update" else first


def _run_block(
    config: ModelConfig,
    block: Any,
    x_BTD: jax.Array,
    inputs: RoutingInputs,
    first: KeyValue | None,
    r: jax.Array,
    selected_BT: jax.Array,
    unshared: Unshared | None,
) -> tuple[jax.Array, KeyValue | None]:
    """One full-length pass; returns the block's output and recursion 1's keys and values to carry on."""
    fresh_BT = _fresh(config, r, selected_BT)
    context = scan_context(config, inputs.view, first, fresh_BT, selected_BT)
    out_BTD, kv = run_block(block, x_BTD, context, first, unshared)
    if first is None:
        return out_BTD, None
    return out_BTD, jax.tree.map(lambda fresh, kept: jnp.where(r == 0, fresh, kept), kv, first)


def _scan(config: ModelConfig, body: Any, block: nn.Module, carry: Any, inputs: Any) -> Any:
    recursions = config.recursion.num_recursions
    scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=recursions)
    return scan(block, carry, inputs)


def expert_scan(
    config: ModelConfig, block: nn.Module, x_BTD: jax.Array, inputs: RoutingInputs, *, mode: Mode, return_stages: bool
) -> Routed:
    """Expert-choice over whole rows, by top-k or by threshold."""
    length, recursions = x_BTD.shape[1], config.recursion.num_recursions
    shares = config.recursion.kv_strategy != "recursion"

    def body(block: Any, carry: Any, xs: Any) -> Any:
        x_BTD, active_BT, first = carry
        r, router_r, aux_r, unshared_r, count, boundary, noise_BT = xs
        raw, aux = expert_scores(config, router_r, aux_r, x_BTD, noise_BT)
        if mode == "topk":
            # padding ranks below every token, tokens that have left below padding
            ranking = jnp.where(inputs.counted_BT, jax.lax.stop_gradient(raw), jnp.finfo(jnp.float32).min)
            selected_BT = active_BT & top_mask(jnp.where(active_BT, ranking, -jnp.inf), count)
        else:
            selected_BT = active_BT & (aux >= boundary)
        out, first = _run_block(config, block, x_BTD, inputs, first, r, selected_BT, unshared_r)
        gate = score(config, raw)
        x_BTD = jnp.where(selected_BT[:, :, None], x_BTD + gated(config, gate, out, x_BTD, inputs.step), x_BTD)
        record = (raw, aux, active_BT, selected_BT, gate, x_BTD if return_stages else None)
        return (x_BTD, selected_BT, first), record

    xs = (
        jnp.arange(recursions),
        inputs.router,
        inputs.aux_router,
        inputs.unshared,
        _counts(config, length, inputs.step),
        inputs.boundary_R,
        inputs.noise_RBT,
    )
    carry = (x_BTD, jnp.ones(x_BTD.shape[:2], bool), empty_kv(config, x_BTD) if shares else None)
    (x_BTD, _, _), (raw, aux, active, selected, gates, stages) = _scan(config, body, block, carry, xs)
    trace = expert_trace(config, inputs, raw, aux, active, selected, gates)
    return x_BTD, trace, tuple(stages) if return_stages else ()


def token_scan(
    config: ModelConfig, block: nn.Module, x_BTD: jax.Array, inputs: RoutingInputs, *, return_stages: bool
) -> Routed:
    """Token-choice over whole rows: every token takes the passes it asks for."""
    shares = config.recursion.kv_strategy != "recursion"
    raw_BTR, gates_BTR, chosen_BT = choose_depth(config, x_BTD, inputs)

    def body(block: Any, carry: Any, xs: Any) -> Any:
        state, delta, first = carry
        r, unshared_r, gate = xs
        selected_BT = chosen_BT > r
        out, first = _run_block(config, block, state, inputs, first, r, selected_BT, unshared_r)
        leaves_BT1 = (chosen_BT == r + 1)[:, :, None]
        delta = jnp.where(leaves_BT1, gated(config, gate, out, x_BTD, inputs.step), delta)
        state = jnp.where(selected_BT[:, :, None], out, state)
        stage = jnp.where(selected_BT[:, :, None], out, jnp.zeros((), out.dtype)) if return_stages else None
        return (state, delta, first), (selected_BT, stage)

    xs = (jnp.arange(config.recursion.num_recursions), inputs.unshared, jnp.moveaxis(gates_BTR, -1, 0))
    carry = (x_BTD, jnp.zeros_like(x_BTD), empty_kv(config, x_BTD) if shares else None)
    (_, delta, _), (selected, stages) = _scan(config, body, block, carry, xs)
    trace = token_trace(config, inputs, raw_BTR, gates_BTR, chosen_BT, selected)
    return x_BTD + delta, trace, tuple(stages) if return_stages else ()

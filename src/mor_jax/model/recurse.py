"""Repeated application of the shared block without a router, and the contexts of its passes, routed or not.

Paper section 2.1 (parameter sharing) and 2.2.2 (keys and values). Letters: B batch, T tokens of a row, C computed
tokens, D width, R recursions, L layers in the block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.kernels.rotary import rotary_rows, rotary_tables
from mor_jax.mesh.axes import constrain
from mor_jax.model.layer_context import LayerContext, Stream
from mor_jax.model.relaxation import Unshared

Block = Callable[[Stream, LayerContext, KeyValue | None, Unshared | None], tuple[Stream, KeyValue | None]]


def run_block(
    block: Block, x_BCD: jax.Array, context: LayerContext, cached: KeyValue | None, unshared: Unshared | None
) -> tuple[jax.Array, KeyValue | None]:
    """One pass: hidden states [B, C, D] through all layers of the block."""
    stream, kv = block(Stream.enter(x_BCD), context, cached, unshared)
    return stream.x_BCD, kv


def make_context(config: ModelConfig, queries: TokenView, **fields: Any) -> LayerContext:
    """Context of one pass; the rotary tables are computed here, once for all layers, in both forms (one is unused)."""
    rotary = rotary_tables(queries.positions_BC, config.head_dim, config.rope_theta)
    rotary = jax.tree.map(lambda table: constrain(table, "batch", "sequence", None, None), rotary)
    rows = constrain(_rows(config, queries), "batch", None, "sequence")
    keys = rows if fields.get("keys") is None else _rows(config, fields["keys"])
    both = (rows, constrain(keys, "batch", None, None))
    return LayerContext(queries=queries, rotary=rotary, rotary_rows=both, **fields)


def _rows(config: ModelConfig, view: TokenView) -> jax.Array:
    return rotary_rows(view.positions_BC, config.head_dim, config.rope_theta)


def at(tree: Any, recursion: int) -> Any:
    """Slice the leading recursion axis of a tree (None stays None)."""
    return jax.tree.map(lambda a: a[recursion], tree)


def recurse(
    config: ModelConfig,
    block: Block,
    x_BTD: jax.Array,
    view: TokenView,
    unshared: Unshared | None,
    first_values_BTX: jax.Array | None = None,
) -> list[jax.Array]:
    """Apply the block N_r times to every token in a Python loop; return the hidden states after each pass.

    ``first_values_BTX`` is of ``modern_parts.first_values``.
    """
    shares = config.recursion.kv_strategy == "shared"
    cached, states = None, []
    for r in range(config.recursion.num_recursions):
        # queries are all rows: their own causality
        context = make_context(config, view, keep_kv=shares and r == 0, first_values_BCX=first_values_BTX)
        x_BTD, kv = run_block(block, x_BTD, context, cached, at(unshared, r))
        cached = kv if shares and r == 0 else cached
        states.append(x_BTD)
    return states


def recurse_scan(
    config: ModelConfig,
    block: nn.Module,
    x_BTD: jax.Array,
    view: TokenView,
    unshared: Unshared | None,
) -> list[jax.Array]:
    """The same through `nn.scan` over recursions: one traced body whatever N_r is."""
    recursions = config.recursion.num_recursions
    shares = config.recursion.kv_strategy == "shared"

    def body(block: Any, carry: Any, inputs: Any) -> Any:
        x_BTD, first = carry
        r, unshared_r = inputs
        context = scan_context(config, view, first, r == 0)
        x_BTD, kv = run_block(block, x_BTD, context, first, unshared_r)
        return (x_BTD, kv), x_BTD

    first = empty_kv(config, x_BTD) if shares else None
    scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=recursions)
    _, states = scan(block, (x_BTD, first), (jnp.arange(recursions), unshared))
    return list(states)


def empty_kv(config: ModelConfig, x_BTD: jax.Array) -> KeyValue:
    """Zero keys and values [L, B, T, K, H] to carry before recursion 1 fills them."""
    shape = (config.block_depth, *x_BTD.shape[:2], config.num_kv_heads, config.head_dim)
    zeros = constrain(jnp.zeros(shape, x_BTD.dtype), "layers", "batch", "sequence", "kv_heads", "head_dim")
    return zeros, zeros


def scan_context(
    config: ModelConfig,
    view: TokenView,
    first: KeyValue | None,
    fresh: jax.Array,
    selected_BT: jax.Array | None = None,
) -> LayerContext:
    """Full-length context: recursion 1's keys and values (`first`) where `fresh` is false.

    Args:
        config: the model.
        view: all tokens.
        first: recursion 1's keys and values; None when every recursion has its own.
        fresh: bool scalar or [B, T]: rows with fresh keys and values.
        selected_BT: bool: without `first`, the only tokens that may be attended to.
    """
    if first is not None:
        fresh_BS = jnp.broadcast_to(fresh, view.rows_BC.shape)
        return make_context(config, view, fresh_BS=fresh_BS, keep_kv=True)
    if selected_BT is not None:
        valid_BT = selected_BT if view.valid_BC is None else selected_BT & view.valid_BC
        view = dataclasses.replace(view, valid_BC=valid_BT)
    return make_context(config, view)

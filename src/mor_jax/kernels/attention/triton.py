"""Flash attention for NVIDIA GPUs in Pallas (Triton): every query attends to one run of keys, given at run time.

Memory is linear in the lengths, forward and backward, and blocks of keys (or of queries) that no query (or key) of a
block needs are never read. That covers causal attention, packed documents, and recursive key/value sharing, whose
selected queries attend to all keys up to their own row (paper section 2.2.2).

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim, I blocks of queries,
J blocks of keys.

References:
    Dao, FlashAttention-2 (2023), for the recurrences; the code is this project's own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mor_jax.kernels.attention.mask import NEVER
from mor_jax.kernels.attention.triton_kernels import (
    Blocks,
    Tiling,
    forward_kernel,
    grad_keys_kernel,
    grad_queries_kernel,
)
from mor_jax.kernels.padding import pad_axis
from mor_jax.kernels.pallas_triton import call_kernel, is_available


def takes(dtype: str, head_dim: int) -> bool:
    """Whether the kernels exist with this version of JAX, and take such arrays: 16 bits, blocks of powers of two."""
    return is_available() and jnp.dtype(dtype).itemsize == 2 and head_dim >= 16 and head_dim & (head_dim - 1) == 0


def flash_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    start_BT: jax.Array | None,
    end_BT: jax.Array,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of every query over the keys ``start <= s < end``; scores scaled by H^-0.5, in float32.

    Args:
        query_BTNH: queries; head n reads key/value head n // G.
        key_BSKH: keys.
        value_BSKH: values.
        start_BT: int32, first key of each query; None is 0.
        end_BT: int32, one past its last key, at most S. Skipping works best when both ascend; nothing else needs it.
        tiling: block sizes.
        interpret: run in Pallas' interpreter, on any device, for tests.

    Returns:
        [B, T, N, H] in the queries' dtype; 0 for a query without keys.
    """
    tiling = tiling or Tiling()
    key_BSKH, value_BSKH = (pad_axis(x, 1, tiling.key_multiple) for x in (key_BSKH, value_BSKH))
    return _attention(tiling, interpret, query_BTNH, key_BSKH, value_BSKH, start_BT, end_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(tiling, interpret, query, key, value, start, end):
    return _forward(tiling, interpret, query, key, value, start, end)[0]


def _forward(tiling, interpret, query, key, value, start, end):
    out, lse = _forward_call(tiling.forward, interpret, query, key, value, start, end)
    return out, (query, key, value, start, end, out, lse)


def _backward(tiling, interpret, residuals, grad_out):
    query, key, value, start, end, out, lse = residuals
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", grad_out, out, preferred_element_type=jnp.float32)
    shared = (query, key, value, start, end, grad_out, lse, delta_BNT)
    grad_query = _grad_queries_call(tiling.grad_queries, interpret, *shared)
    grad_key, grad_value = _grad_keys_call(tiling.grad_keys, interpret, *shared)
    return grad_query, grad_key, grad_value, None, None


_attention.defvjp(_forward, _backward)


def _query_blocks(start: Any, end: jax.Array, blocks: Blocks, length: int) -> jax.Array:
    """int32 [B, J, 2]: first and one past the last block of queries that a block of keys is visible to."""
    end = pad_axis(end, 1, blocks.queries)
    start = None if start is None else pad_axis(start, 1, blocks.queries, NEVER)
    batch, queries = end.shape
    tiles = queries // blocks.queries
    lowest = blocks.keys * jnp.arange(length // blocks.keys, dtype=jnp.int32)[None, :, None]
    reach_BI = jnp.max(end.reshape(batch, tiles, blocks.queries), axis=2)
    needs_BJI = reach_BI[:, None, :] > lowest
    if start is not None:
        begin_BI = jnp.min(start.reshape(batch, tiles, blocks.queries), axis=2)
        needs_BJI &= begin_BI[:, None, :] < lowest + blocks.keys
    index = jnp.arange(tiles, dtype=jnp.int32)[None, None, :]
    first_BJ = jnp.min(jnp.where(needs_BJI, index, tiles), axis=2)
    last_BJ = jnp.max(jnp.where(needs_BJI, index + 1, 0), axis=2)
    return jnp.stack([first_BJ, last_BJ], axis=2)


def _by_query_block(blocks: Blocks, heads: int, kv_heads: int, length: int, width: int, has_start: bool) -> Any:
    """Grid axes (query block, batch x head) and the specs of query, key, value, ranges, and [B, N, T] rows."""
    groups = heads // kv_heads
    query = pl.BlockSpec((None, blocks.queries, None, width), lambda i, bn: (bn // heads, i, bn % heads, 0))
    keys = pl.BlockSpec((None, length, None, width), lambda _, bn: (bn // heads, 0, bn % heads // groups, 0))
    span = pl.BlockSpec((None, blocks.queries), lambda i, bn: (bn // heads, i))
    rows = pl.BlockSpec((None, None, blocks.queries), lambda i, bn: (bn // heads, bn % heads, i))
    return query, keys, [span] * (1 + has_start), rows


def _forward_call(blocks, interpret, query, key, value, start, end):
    batch, length, heads, width = query.shape
    has_start = start is not None
    q, kv, spans, rows = _by_query_block(blocks, heads, key.shape[2], key.shape[1], width, has_start)
    kernel = functools.partial(forward_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start)
    ranges = [start, end] if has_start else [end]
    return call_kernel(
        kernel,
        "mor_attention_forward",
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
        grid=(pl.cdiv(length, blocks.queries), batch * heads),
        in_specs=[q, kv, kv, *spans],
        out_specs=[q, rows],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
    )(query, key, value, *ranges)


def _grad_queries_call(blocks, interpret, query, key, value, start, end, grad_out, lse, delta):
    batch, length, heads, width = query.shape
    has_start = start is not None
    q, kv, spans, rows = _by_query_block(blocks, heads, key.shape[2], key.shape[1], width, has_start)
    kernel = functools.partial(
        grad_queries_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start
    )
    ranges = [start, end] if has_start else [end]
    return call_kernel(
        kernel,
        "mor_attention_grad_queries",
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
        grid=(pl.cdiv(length, blocks.queries), batch * heads),
        in_specs=[q, kv, kv, *spans, q, rows, rows],
        out_specs=q,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(query, key, value, *ranges, grad_out, lse, delta)


def _grad_keys_call(blocks, interpret, query, key, value, start, end, grad_out, lse, delta):
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    groups, has_start = heads // kv_heads, start is not None
    kernel = functools.partial(grad_keys_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start)
    padded = pl.cdiv(length, blocks.queries) * blocks.queries
    q = pl.BlockSpec((None, padded, groups, width), lambda _, bk: (bk // kv_heads, 0, bk % kv_heads, 0))
    kv = pl.BlockSpec((None, blocks.keys, None, width), lambda j, bk: (bk // kv_heads, j, bk % kv_heads, 0))
    span = pl.BlockSpec((None, padded), lambda _, bk: (bk // kv_heads, 0))
    rows = pl.BlockSpec((None, groups, padded), lambda _, bk: (bk // kv_heads, bk % kv_heads, 0))
    tiles = pl.BlockSpec((None, None, 2), lambda j, bk: (bk // kv_heads, j, 0))
    ranges = [start, end] if has_start else [end]
    return call_kernel(
        kernel,
        "mor_attention_grad_keys",
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
        grid=(keys // blocks.keys, batch * kv_heads),
        in_specs=[q, kv, kv, *[span] * len(ranges), q, rows, rows, tiles],
        out_specs=[kv, kv],
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
    )(query, key, value, *ranges, grad_out, lse, delta, _query_blocks(start, end, blocks, keys))

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
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_LOG2_E = math.log2(math.e)
_MASKED = -1e30


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch parameters of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of the three kernels; the defaults were the fastest measured on an H100 at head_dim 64."""

    forward: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)
    grad_queries: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)
    grad_keys: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)

    @property
    def key_multiple(self) -> int:
        """What the number of keys is padded to."""
        return math.lcm(self.forward.keys, self.grad_queries.keys, self.grad_keys.keys)


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
    key_BSKH, value_BSKH = (_pad(x, tiling.key_multiple) for x in (key_BSKH, value_BSKH))
    return _attention(tiling, interpret, query_BTNH, key_BSKH, value_BSKH, start_BT, end_BT)


def _pad(x_BT: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind axis 1: queries without keys, keys without queries."""
    if x_BT.shape[1] % multiple == 0:
        return x_BT
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % multiple)
    return jnp.pad(x_BT, widths)


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


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """Matrix product in the inputs' dtype, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _rows(ref: Any, index: Any, size: int) -> tuple[Any, ...]:
    """Index of block ``index`` along the first axis."""
    return (pl.ds(index * size, size), *(slice(None),) * (len(ref.shape) - 1))


def _load(ref: Any, inside: Any) -> jax.Array:
    """Load a block whose rows beyond the array's end read as 0; ``inside`` is bool per row, or None for all."""
    if inside is None:
        return plt.load(ref)
    mask = jax.lax.broadcast_in_dim(inside, ref.shape, (0,))
    return plt.load(ref, mask=mask, other=0)


def _store(ref: Any, value: jax.Array, inside: Any) -> None:
    mask = None if inside is None else jax.lax.broadcast_in_dim(inside, value.shape, (0,))
    plt.store(ref, value, mask=mask)


def _inside(index: Any, size: int, length: int) -> Any:
    """bool: which rows of block ``index`` exist; None if all of every block do."""
    return None if length % size == 0 else index * size + jax.lax.iota(jnp.int32, size) < length


def _visible(index: Any, size: int, start: Any, end: Any, axis: int) -> jax.Array:
    """bool: which pairs of a tile may meet; keys of block ``index`` along ``axis``, queries along the other."""
    shape = (end.shape[0], size) if axis == 1 else (size, end.shape[0])
    keys = index * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    other = lambda x: jax.lax.broadcast_in_dim(x, shape, (1 - axis,))  # noqa: E731
    mask = keys < other(end)
    return mask if start is None else mask & (keys >= other(start))


def _key_blocks(start: Any, end: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Blocks of keys of a tile of queries: [first, whole) masked, [whole, rest) all visible, [rest, last) masked."""
    last = pl.cdiv(jnp.max(end), size)
    rest = jnp.min(end) // size
    first = whole = jnp.zeros_like(last)
    if start is not None:
        first = jnp.min(start) // size
        whole = pl.cdiv(jnp.max(start), size)
    whole = jnp.minimum(whole, last)
    return first, whole, jnp.maximum(rest, whole), last


def _over_key_blocks(start: Any, end: Any, size: int, step: Any, carry: Any) -> Any:
    first, whole, rest, last = _key_blocks(start, end, size)
    masked = functools.partial(step, masked=True)
    if start is not None:
        carry = jax.lax.fori_loop(first, whole, masked, carry)
    carry = jax.lax.fori_loop(whole, rest, functools.partial(step, masked=False), carry)
    return jax.lax.fori_loop(rest, last, masked, carry)


def _forward_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    query_ref, key_ref, value_ref, *ranges, out_ref, lse_ref = refs
    inside = _inside(pl.program_id(0), blocks.queries, length)
    end, start = _load(ranges[-1], inside), _load(ranges[0], inside) if has_start else None
    query = _load(query_ref, inside)

    def step(index: Any, carry: Any, *, masked: bool) -> Any:
        top, total, sums = carry
        key, value = (ref[_rows(ref, index, blocks.keys)] for ref in (key_ref, value_ref))
        scores = _dot(query, key, contract=(1, 1)) * (scale * _LOG2_E)
        if masked:
            scores = jnp.where(_visible(index, blocks.keys, start, end, 1), scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        if masked:
            weights = jnp.where(scores > _MASKED / 2, weights, 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums = sums * shrink[:, None] + _dot(weights.astype(value.dtype), value, contract=(1, 0))
        return new_top, total, sums

    count = query.shape[0]
    carry = (jnp.full((count,), _MASKED), jnp.zeros((count,), jnp.float32), jnp.zeros(query.shape, jnp.float32))
    top, total, sums = _over_key_blocks(start, end, blocks.keys, step, carry)
    total = jnp.where(total > 0, total, 1.0)
    _store(out_ref, (sums / total[:, None]).astype(out_ref.dtype), inside)
    _store(lse_ref, top + jnp.log2(total), inside)


def _grad_queries_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    query_ref, key_ref, value_ref, *ranges, grad_out_ref, lse_ref, delta_ref, grad_ref = refs
    inside = _inside(pl.program_id(0), blocks.queries, length)
    end, start = _load(ranges[-1], inside), _load(ranges[0], inside) if has_start else None
    query, grad_out, lse, delta = (_load(ref, inside) for ref in (query_ref, grad_out_ref, lse_ref, delta_ref))

    def step(index: Any, grad: Any, *, masked: bool) -> Any:
        key, value = (ref[_rows(ref, index, blocks.keys)] for ref in (key_ref, value_ref))
        scores = _dot(query, key, contract=(1, 1)) * (scale * _LOG2_E)
        weights = jnp.exp2(scores - lse[:, None])
        if masked:
            weights = jnp.where(_visible(index, blocks.keys, start, end, 1), weights, 0.0)
        grad_weights = _dot(grad_out, value, contract=(1, 1))
        grad_scores = weights * (grad_weights - delta[:, None])
        return grad + _dot(grad_scores.astype(key.dtype), key, contract=(1, 0))

    grad = _over_key_blocks(start, end, blocks.keys, step, jnp.zeros(query.shape, jnp.float32))
    _store(grad_ref, (grad * scale).astype(grad_ref.dtype), inside)


def _grad_keys_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    query_ref, key_ref, value_ref, *ranges, grad_out_ref, lse_ref, delta_ref, span_ref = refs[:-2]
    grad_key_ref, grad_value_ref = refs[-2:]
    block = pl.program_id(0)
    key, value = key_ref[...], value_ref[...]
    groups = query_ref.shape[1]

    def step(index: Any, carry: Any, *, group: Any) -> Any:
        grad_key, grad_value = carry
        rows, inside = pl.ds(index * blocks.queries, blocks.queries), _inside(index, blocks.queries, length)
        query, grad_out = (_load(ref.at[rows, group, :], inside) for ref in (query_ref, grad_out_ref))
        lse, delta = (_load(ref.at[group, rows], inside) for ref in (lse_ref, delta_ref))
        end = _load(ranges[-1].at[rows], inside)
        start = _load(ranges[0].at[rows], inside) if has_start else None
        scores = _dot(key, query, contract=(1, 1)) * (scale * _LOG2_E)
        weights = jnp.exp2(scores - lse[None, :])
        weights = jnp.where(_visible(block, blocks.keys, start, end, 0), weights, 0.0)
        grad_value += _dot(weights.astype(value.dtype), grad_out, contract=(1, 0))
        grad_weights = _dot(value, grad_out, contract=(1, 1))
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key += _dot(grad_scores.astype(query.dtype), query, contract=(1, 0))
        return grad_key, grad_value

    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    first, last = span_ref[0], span_ref[1]
    for group in range(groups):
        # a number that is traced: masked loads in interpret mode take no other
        traced = jax.lax.convert_element_type(block * 0 + group, jnp.int32)
        carry = jax.lax.fori_loop(first, last, functools.partial(step, group=traced), carry)
    grad_key, grad_value = carry
    grad_key_ref[...] = (grad_key * scale).astype(grad_key_ref.dtype)
    grad_value_ref[...] = grad_value.astype(grad_value_ref.dtype)


def _query_blocks(start: Any, end: jax.Array, blocks: Blocks, length: int) -> jax.Array:
    """int32 [B, J, 2]: first and one past the last block of queries that a block of keys is visible to."""
    end = _pad(end, blocks.queries)
    start = None if start is None else _pad(start, blocks.queries)
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


def _call(kernel: Any, blocks: Blocks, interpret: bool, name: str, **arguments: Any) -> Any:
    params = plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    extra = {} if interpret else {"compiler_params": params}
    return pl.pallas_call(kernel, interpret=interpret, name=name, **extra, **arguments)


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
    kernel = functools.partial(_forward_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start)
    ranges = [start, end] if has_start else [end]
    return _call(
        kernel,
        blocks,
        interpret,
        "mor_attention_forward",
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
        _grad_queries_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start
    )
    ranges = [start, end] if has_start else [end]
    return _call(
        kernel,
        blocks,
        interpret,
        "mor_attention_grad_queries",
        grid=(pl.cdiv(length, blocks.queries), batch * heads),
        in_specs=[q, kv, kv, *spans, q, rows, rows],
        out_specs=q,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(query, key, value, *ranges, grad_out, lse, delta)


def _grad_keys_call(blocks, interpret, query, key, value, start, end, grad_out, lse, delta):
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    groups, has_start = heads // kv_heads, start is not None
    kernel = functools.partial(_grad_keys_kernel, blocks=blocks, length=length, scale=width**-0.5, has_start=has_start)
    padded = pl.cdiv(length, blocks.queries) * blocks.queries
    q = pl.BlockSpec((None, padded, groups, width), lambda _, bk: (bk // kv_heads, 0, bk % kv_heads, 0))
    kv = pl.BlockSpec((None, blocks.keys, None, width), lambda j, bk: (bk // kv_heads, j, bk % kv_heads, 0))
    span = pl.BlockSpec((None, padded), lambda _, bk: (bk // kv_heads, 0))
    rows = pl.BlockSpec((None, groups, padded), lambda _, bk: (bk // kv_heads, bk % kv_heads, 0))
    tiles = pl.BlockSpec((None, None, 2), lambda j, bk: (bk // kv_heads, j, 0))
    ranges = [start, end] if has_start else [end]
    return _call(
        kernel,
        blocks,
        interpret,
        "mor_attention_grad_keys",
        grid=(keys // blocks.keys, batch * kv_heads),
        in_specs=[q, kv, kv, *[span] * len(ranges), q, rows, rows, tiles],
        out_specs=[kv, kv],
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
    )(query, key, value, *ranges, grad_out, lse, delta, _query_blocks(start, end, blocks, keys))


def visible_runs(
    rows_BT: jax.Array | None, segments_BT: jax.Array | None, key_segments_BS: jax.Array | None, length: int
) -> tuple[jax.Array | None, jax.Array]:
    """Describe "key row <= query row, same document" as one run of keys per query.

    Documents must be contiguous in their rows, as packing makes them.

    Args:
        rows_BT: int32 row of each query among the keys' rows 0..S-1; None when the queries are the keys themselves, and
            slots are compared.
        segments_BT: int32 document of each query; None attends across.
        key_segments_BS: int32 document of each key; the queries' own if ``rows_BT`` is None.
        length: number of queries.

    Returns:
        (start, end) for ``flash_attention``, end int32 [1, T] or [B, T].
    """
    last_BT = jnp.arange(length, dtype=jnp.int32)[None] if rows_BT is None else rows_BT
    keys_BS = segments_BT if rows_BT is None else key_segments_BS
    if segments_BT is None or keys_BS is None:
        return None, last_BT + 1
    index_BS = jnp.broadcast_to(jnp.arange(keys_BS.shape[1], dtype=jnp.int32)[None], keys_BS.shape)
    opens_BS = jnp.pad(keys_BS[:, 1:] != keys_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start_BS = jax.lax.cummax(jnp.where(opens_BS, index_BS, 0), axis=1)
    if rows_BT is None:
        return start_BS, last_BT + 1
    return jnp.take_along_axis(start_BS, rows_BT, axis=1, mode="clip"), last_BT + 1

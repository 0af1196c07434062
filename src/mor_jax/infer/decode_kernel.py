"""One GPU kernel for a decoded token's attention: rotate, append its key and value to the paged cache, and attend.

A program serves one row and one key/value head. It reads the pages of its row where they lie (`xla` must gather them
into a dense copy first) and takes the row's own key and value from registers, so that rotary
embedding and append need no launches of their own. Decoding small batches is bound by launches as much as by bytes.
Letters: B rows, M heads projected, P pages, Z entries per page, G query heads per key/value head, X entries of a read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mor_jax.model.attention import KeyValue
from mor_jax.model.layers import Rotary

_ENTRIES = 64
"""Cache entries that a program reads at a time."""


def _attend_to(query: KeyValue, keys: KeyValue, values_XH: jax.Array, valid_X: jax.Array, state: Any) -> Any:
    """Online softmax over some entries: state is (running maximum, normaliser, weighted values [H])."""
    top, total, sum_H = state
    dots_X = sum(jnp.sum(keys[i] * query[i][None, :], axis=1) for i in range(2))
    score_X = jnp.where(valid_X, dots_X, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(score_X))
    weight_X, kept = jnp.exp(score_X - new_top), jnp.exp(top - new_top)
    sum_H = sum_H * kept + jnp.sum(values_XH * weight_X[:, None], axis=0)
    return new_top, total * kept + jnp.sum(weight_X), sum_H


def _rotated(ref: Any, head: Any, cos: jax.Array, sin: jax.Array) -> KeyValue:
    """The halves of a rotated head, rounded to the compute dtype as ``apply_rotary`` does."""
    half = cos.shape[0]
    first = plgpu.load(ref.at[head, pl.ds(0, half)]).astype(jnp.float32)
    second = plgpu.load(ref.at[head, pl.ds(half, half)]).astype(jnp.float32)
    rotated = first * cos - second * sin, second * cos + first * sin
    return rotated[0].astype(ref.dtype), rotated[1].astype(ref.dtype)


def _kernel(
    table_ref: Any,
    start_ref: Any,
    count_ref: Any,
    visible_ref: Any,
    projected_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    _keys_in: Any,
    _values_in: Any,
    out_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *,
    page_size: int,
    kv_heads: int,
) -> None:
    start, count, head = start_ref[...], count_ref[...], pl.program_id(1)
    stored = visible_ref[...] - count  # entries that lie in the cache already
    groups, width = out_ref.shape
    half = width // 2
    cos, sin = cos_ref[...], sin_ref[...]
    key = _rotated(projected_ref, groups * kv_heads + head, cos, sin)
    value_H = projected_ref[groups * kv_heads + kv_heads + head, :]
    _append(table_ref, keys_ref, values_ref, key, value_H, start, count, page_size)
    heads = [_rotated(projected_ref, head * groups + g, cos, sin) for g in range(groups)]
    queries = [tuple(part.astype(jnp.float32) * width**-0.5 for part in parts) for parts in heads]
    key32, value32_H = tuple(part.astype(jnp.float32) for part in key), value_H.astype(jnp.float32)

    def read(step: Any, states: Any) -> Any:
        entry_X = step * _ENTRIES + jnp.arange(_ENTRIES)
        valid_X = entry_X < stored
        page_X = plgpu.load(table_ref.at[entry_X // page_size], mask=valid_X, other=0)
        row_X = page_X * page_size + entry_X % page_size
        keys = (_tile(keys_ref, row_X, valid_X, 0, half), _tile(keys_ref, row_X, valid_X, half, half))
        values_XH = _tile(values_ref, row_X, valid_X, 0, width)
        return tuple(_attend_to(q, keys, values_XH, valid_X, s) for q, s in zip(queries, states, strict=True))

    # the row's own entry first: a finite maximum even where nothing is stored; a row that appends nothing finds its own
    # entry in the cache, so here its weight is 0
    own = count.astype(jnp.float32)
    tops = [jnp.sum(query[0] * key32[0]) + jnp.sum(query[1] * key32[1]) for query in queries]
    states = tuple((top, own, value32_H * own) for top in tops)
    states = jax.lax.fori_loop(0, pl.cdiv(stored, _ENTRIES), read, states)
    for g, (_, total, sum_H) in enumerate(states):
        out_ref[g, :] = (sum_H / jnp.maximum(total, 1e-30)).astype(out_ref.dtype)


def _append(
    table_ref: Any, keys_ref: Any, values_ref: Any, key: KeyValue, value_H: jax.Array, start: Any, count: Any, size: int
) -> None:
    row = table_ref[start // size] * size + start % size
    half, width = key[0].shape[0], value_H.shape[0]
    for part, first in ((key[0], 0), (key[1], half)):
        place = keys_ref.at[jnp.full((half,), row), first + jnp.arange(half)]
        plgpu.store(place, part, mask=jnp.full((half,), count > 0))
    place = values_ref.at[jnp.full((width,), row), jnp.arange(width)]
    plgpu.store(place, value_H, mask=jnp.full((width,), count > 0))


def _tile(ref: Any, row_X: jax.Array, valid_X: jax.Array, first: int, count: int) -> jax.Array:
    """float32 [X, count]: part of some rows of a pool."""
    shape = (row_X.shape[0], count)
    rows = jnp.broadcast_to(row_X[:, None], shape)
    columns = jnp.broadcast_to(first + jnp.arange(count)[None, :], shape)
    mask = jnp.broadcast_to(valid_X[:, None], shape)
    return plgpu.load(ref.at[rows, columns], mask=mask, other=0.0).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="interpret")
def decode_attention(
    projected_BMH: jax.Array,
    angles: Rotary,
    cached: KeyValue,
    table_BX: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    visible_B: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KeyValue]:
    """Rotate, append one token per row, and attend to the row's entries.

    Args:
        projected_BMH: N queries, K keys and K values of each token, not rotated; query head n reads key/value head
            n // G.
        angles: float32 cosine and sine [B, H/2] of the tokens' positions.
        cached: keys and values [P, Z, K, H] of one layer; updated in place where the caller lets go of them.
        table_BX: int32 pages of each row's group.
        start_B: int32 entries held before.
        count_B: int32: 1 where the token is appended, 0 where the row only reads.
        visible_B: int32 entries to attend to, the appended one included; 0 gives zeros.
        interpret: run the kernel's program on the CPU, to test it.

    Returns:
        Output [B, N, H] in the queries' dtype, and the cache.
    """
    rows, projected, width = projected_BMH.shape
    pages, size, kv_heads, _ = cached[0].shape
    groups = (projected - 2 * kv_heads) // kv_heads
    whole = lambda *shape: pl.BlockSpec((None, *shape), lambda b, _: (b, *(0,) * len(shape)))  # noqa: E731
    pool = pl.BlockSpec((pages * size, None, width), lambda _, k: (0, k, 0))
    out = pl.BlockSpec((None, None, groups, width), lambda b, k: (b, k, 0, 0))
    angle, scalar = whole(width // 2), whole()
    flat = tuple(x.reshape(pages * size, kv_heads, width) for x in cached)
    call = pl.pallas_call(
        functools.partial(_kernel, page_size=size, kv_heads=kv_heads),
        grid=(rows, kv_heads),
        in_specs=[whole(table_BX.shape[1]), scalar, scalar, scalar, whole(projected, width), angle, angle, pool, pool],
        out_specs=[out, pool, pool],
        out_shape=[
            jax.ShapeDtypeStruct((rows, kv_heads, groups, width), projected_BMH.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat),
        ],
        input_output_aliases={7: 1, 8: 2},
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )
    out_BKGH, *flat = call(table_BX, start_B, count_B, visible_B, projected_BMH, *angles, *flat)
    keys, values = (x.reshape(cached[0].shape) for x in flat)
    return out_BKGH.reshape(rows, groups * kv_heads, width), (keys, values)

"""A decoded token's attention to a paged cache: plain, and as one GPU kernel that rotates, appends and attends.

A program serves one row and one key/value head, with all its query heads at once. It reads the pages of its row where
they lie (the plain path must gather them into a dense copy) and takes the row's own key and value from registers, so
that rotary embedding and append need no launches of their own. Decoding small batches is bound by launches as much as
by bytes.

Letters: B rows, M heads projected (or pages per group), Y groups, P pages, Z entries per page, G query heads per
key/value head (padded for the tensor cores), X entries of a read.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mor_jax.array_types import KeyValue
from mor_jax.kernels.attention.reference import plain_attention
from mor_jax.kernels.int8_pages import KeyValuePages, gather_pages
from mor_jax.kernels.pallas_triton import call_kernel, plt
from mor_jax.kernels.rotary import Rotary


@dataclass(frozen=True)
class Reads:
    """How a program reads its row's cache. Of eight choices on an H100 the default was the fastest at 82 rows, and
    within 3% of it at 32 (experiments/serving/results/attention.json)."""

    entries: int = 128
    """Cache entries at a time, a power of 2 from 16."""
    warps: int = 4
    stages: int = 2
    """Reads in flight."""


_MIN_ROWS = 16
"""Of a product on the tensor cores."""


def _rotated(ref: Any, head_X: jax.Array, valid_X: jax.Array, cos_ref: Any, sin_ref: Any) -> jax.Array:
    """Rotated heads [X, H], rounded to the compute dtype as ``apply_rotary`` does."""
    half = cos_ref.shape[0]
    shape, nth_H = (head_X.shape[0], 2 * half), jnp.arange(2 * half)
    angle = lambda table_ref: plt.load(table_ref.at[nth_H % half])[None, :]  # noqa: E731

    def load(column_H: jax.Array) -> jax.Array:
        rows, columns = (jnp.broadcast_to(x, shape) for x in (head_X[:, None], column_H[None, :]))
        mask = jnp.broadcast_to(valid_X[:, None], shape)
        return plt.load(ref.at[rows, columns], mask=mask, other=0).astype(jnp.float32)

    # the other half of the head, read where it lies: registers of two halves cannot be joined
    sign_1H = jnp.where(nth_H < half, -1.0, 1.0)[None, :]
    rotated = load(nth_H) * angle(cos_ref) + sign_1H * load((nth_H + half) % (2 * half)) * angle(sin_ref)
    return rotated.astype(ref.dtype)


def _kernel(
    table_ref: Any,
    group_ref: Any,
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
    entries: int,
) -> None:
    group, start, count, head = group_ref[...], start_ref[...], count_ref[...], pl.program_id(1)
    stored = visible_ref[...] - count  # entries that lie in the cache already
    groups, width = out_ref.shape
    nth_G, nth_H = jnp.arange(max(_MIN_ROWS, pl.next_power_of_2(groups))), jnp.arange(width)
    query_GH = _rotated(projected_ref, head * groups + nth_G, nth_G < groups, cos_ref, sin_ref)
    first_key = groups * kv_heads + head
    key_1H = _rotated(projected_ref, jnp.full((1,), first_key), jnp.full((1,), True), cos_ref, sin_ref)
    value_1H = projected_ref[first_key + kv_heads, :][None, :]
    # a row that appends nothing may be full: there is no next page, and nothing is stored
    row = table_ref[group, jnp.minimum(start // page_size, table_ref.shape[1] - 1)] * page_size + start % page_size
    for ref, own_1H in ((keys_ref, key_1H), (values_ref, value_1H)):
        place = ref.at[jnp.full((1, width), row), nth_H[None, :]]
        plt.store(place, own_1H, mask=jnp.full((1, width), count > 0))
    precision = jax.lax.Precision.HIGHEST if query_GH.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def read(step: Any, state: Any) -> Any:
        top_G, total_G, sum_GH = state
        entry_X = step * entries + jnp.arange(entries)
        valid_X = entry_X < stored
        page_X = plt.load(table_ref.at[group, entry_X // page_size], mask=valid_X, other=0)
        rows_XH = jnp.broadcast_to((page_X * page_size + entry_X % page_size)[:, None], (entries, width))
        columns_XH = jnp.broadcast_to(nth_H[None, :], (entries, width))
        mask = jnp.broadcast_to(valid_X[:, None], (entries, width))
        keys_XH = plt.load(keys_ref.at[rows_XH, columns_XH], mask=mask, other=0)
        values_XH = plt.load(values_ref.at[rows_XH, columns_XH], mask=mask, other=0)
        score_GX = dot(query_GH, keys_XH, (((1,), (1,)), ((), ()))) * width**-0.5
        score_GX = jnp.where(valid_X[None, :], score_GX, -jnp.inf)
        new_top_G = jnp.maximum(top_G, jnp.max(score_GX, axis=1))
        weight_GX, kept_G = jnp.exp(score_GX - new_top_G[:, None]), jnp.exp(top_G - new_top_G)
        fresh_GH = dot(weight_GX.astype(values_XH.dtype), values_XH, (((1,), (0,)), ((), ())))
        return new_top_G, total_G * kept_G + jnp.sum(weight_GX, axis=1), sum_GH * kept_G[:, None] + fresh_GH

    # the row's own entry first: a finite maximum where nothing is stored yet; a row that appends nothing finds its own
    # entry in the cache, so here it counts for nothing, not even for the maximum, beside which others would vanish
    own = count.astype(jnp.float32)
    top_G = jnp.sum(query_GH.astype(jnp.float32) * key_1H.astype(jnp.float32), axis=1) * width**-0.5
    top_G = jnp.where(jnp.full(top_G.shape, count > 0), top_G, -jnp.inf)
    sum_GH = jnp.broadcast_to(value_1H.astype(jnp.float32) * own, query_GH.shape)
    state = (top_G, jnp.full(top_G.shape, own), sum_GH)
    _, total_G, sum_GH = jax.lax.fori_loop(0, pl.cdiv(stored, entries), read, state)
    out_GH = (sum_GH / jnp.maximum(total_G, 1e-30)[:, None]).astype(out_ref.dtype)
    rows_GH, columns_GH = (jnp.broadcast_to(x, out_GH.shape) for x in (nth_G[:, None], nth_H[None, :]))
    plt.store(out_ref.at[rows_GH, columns_GH], out_GH, mask=rows_GH < groups)


def attend_to_pages(
    query_BTNH: jax.Array, cached: KeyValuePages, table_BM: jax.Array, visible_BT: jax.Array, page_size: int
) -> jax.Array:
    """Plain attention to a paged cache: gather the pages, then attend to the leading entries.

    Args:
        query_BTNH: rotated queries.
        cached: keys and values [P, Z * K * H] of one layer.
        table_BM: int32 pages of each row's group.
        visible_BT: int32 leading entries that each query sees; one that sees none returns an arbitrary finite value.
        page_size: Z.

    Returns:
        Output [B, T, N, H] in the queries' dtype.
    """
    head_dim, dtype = query_BTNH.shape[-1], query_BTNH.dtype
    keys, values = (gather_pages(pages, table_BM, page_size, head_dim, dtype) for pages in cached)
    mask_BTX = jnp.arange(keys.shape[1])[None, None, :] < visible_BT[:, :, None]
    return plain_attention(query_BTNH, keys, values, mask_BTX[:, None])


@functools.partial(jax.jit, static_argnames=("page_size", "reads", "interpret"))
def decode_attention(
    projected_BMH: jax.Array,
    angles: Rotary,
    cached: KeyValue,
    table_YM: jax.Array,
    group_B: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    visible_B: jax.Array,
    *,
    page_size: int,
    reads: Reads = Reads(),
    interpret: bool = False,
) -> tuple[jax.Array, KeyValue]:
    """Rotate, append one token per row, and attend to the row's entries.

    Args:
        projected_BMH: N queries, K keys and K values of each token, not rotated; query head n reads key/value head
            n // G.
        angles: float32 cosine and sine [B, H/2] of the tokens' positions.
        cached: keys and values [P, Z * K * H] of one layer; updated in place where the caller lets go of them.
        table_YM: int32 pages of every group.
        group_B: int32 group of each row.
        start_B: int32 entries held before.
        count_B: int32: 1 where the token is appended, 0 where the row only reads.
        visible_B: int32 entries to attend to, the appended one included; 0 gives zeros.
        page_size: Z.
        reads: how programs read.
        interpret: run the kernel's program on the CPU, to test it.

    Returns:
        Output [B, N, H] in the queries' dtype, and the cache.
    """
    rows, projected, width = projected_BMH.shape
    entries = cached[0].shape[0] * page_size
    kv_heads = cached[0].size // (entries * width)
    groups = (projected - 2 * kv_heads) // kv_heads
    whole = lambda *shape: pl.BlockSpec((None, *shape), lambda b, _: (b, *(0,) * len(shape)))  # noqa: E731
    table = pl.BlockSpec(table_YM.shape, lambda _, k: (0, 0))
    pool = pl.BlockSpec((entries, None, width), lambda _, k: (0, k, 0))
    out = pl.BlockSpec((None, None, groups, width), lambda b, k: (b, k, 0, 0))
    angle, scalar = whole(width // 2), whole()
    flat = tuple(x.reshape(entries, kv_heads, width) for x in cached)
    call = call_kernel(
        functools.partial(_kernel, page_size=page_size, kv_heads=kv_heads, entries=reads.entries),
        "decode_attention",
        warps=reads.warps,
        stages=reads.stages,
        interpret=interpret,
        grid=(rows, kv_heads),
        in_specs=[table, scalar, scalar, scalar, scalar, whole(projected, width), angle, angle, pool, pool],
        out_specs=[out, pool, pool],
        out_shape=[
            jax.ShapeDtypeStruct((rows, kv_heads, groups, width), projected_BMH.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat),
        ],
        input_output_aliases={8: 1, 9: 2},
    )
    out_BKGH, *flat = call(table_YM, group_B, start_B, count_B, visible_B, projected_BMH, *angles, *flat)
    keys, values = (x.reshape(cached[0].shape) for x in flat)
    return out_BKGH.reshape(rows, groups * kv_heads, width), (keys, values)

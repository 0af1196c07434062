"""Attention on TPUs in Pallas (Mosaic): queries, keys and values as their projections leave them, rotary inside.

The arrays are [B, N H, T], tokens along the lanes: so XLA lays out the results of projections whose N H is no multiple
of 128 (15 heads of width 64), so the kernels compute, and heads are rows, whatever their number. Nothing is transposed,
copied or rotated outside. A program takes a block of queries with all heads, or with as many as vector memory holds.

Letters: B rows, T queries, S keys, N query heads, K key/value heads, H head dim, X heads side by side, I blocks of
queries.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mor_jax.array_types import RotaryRows
from mor_jax.kernels.attention.mask import Mask
from mor_jax.kernels.attention.tpu_kernels import Layout, backward_kernel, forward_kernel
from mor_jax.kernels.padding import pad_axis
from mor_jax.mesh.axes import axis_size, on_shards

_LANES = 128
_VMEM = 60 * 2**20
"""Bytes of vector memory that a kernel may take: a TPU has 64 MiB at least."""
_ROOM = 48 * 2**20
"""Of these, what blocks and scratch may take; the compiler spills into the rest."""


def takes(head_dim: int) -> bool:
    """Whether the kernels take heads of such a width."""
    return head_dim % 64 == 0


def key_part(keys: int, head_dim: int, dtype: Any) -> int:
    """Keys of a row that are attended to at a time: all, or equal parts of whole blocks that fit vector memory."""
    size, part = block_size(keys), keys
    for parts in range(1, pl.cdiv(keys, size) + 1):
        part = pl.cdiv(pl.cdiv(keys, parts), size) * size if parts > 1 else keys
        if _program_bytes(make_layout(_LANES, part, 1, 1, head_dim, dtype), 1, dtype) <= _ROOM:
            break
    return part


def block_size(length: int) -> int:
    """Tokens per block, queries and keys alike: large ones fill the pipelines, small ones waste less of a length."""
    return 512 if length >= 1024 else 256 if length >= 512 else _LANES


def attention_on_shards(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    mask: Mask,
    rotary: RotaryRows | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """``flash_attention`` of a mask, each device on its own rows, heads and (over `context`) queries."""
    length, shards = query_BTNH.shape[1], axis_size("context")
    runs_B2T = pad_axis(mask.bounds(), 2, shards)  # queries that fill up see nothing
    query_BTNH = pad_axis(query_BTNH, 1, shards)
    if rotary is not None:
        rotary = (pad_axis(rotary[0], 2, shards), rotary[1])
    valid_BS = (mask.queries if mask.keys is None else mask.keys).valid_BC
    query, key_value = ("batch", "sequence", "heads", "head_dim"), ("batch", None, "kv_heads", "head_dim")
    in_axes = (query, key_value, key_value, ("batch", None, "sequence"))
    valid_axes = None if valid_BS is None else ("batch", None)
    rotary_axes = None if rotary is None else (("batch", None, "sequence"), ("batch", None, None))
    local = functools.partial(flash_attention, interpret=interpret)
    attention = on_shards(local, (*in_axes, valid_axes, rotary_axes), query)
    return attention(query_BTNH, keys_BSKH, values_BSKH, runs_B2T, valid_BS, rotary)[:, :length]


def _program_bytes(layout: Layout, unit: int, dtype: Any) -> int:
    """Bytes of vector memory that the backward kernel takes with so many key/value heads, about."""
    size, width, padded = jnp.dtype(dtype).itemsize, layout.head_dim, max(layout.head_dim, _LANES)
    per_key = 4 * 2 * size * width + 2 * size * padded + (size + 2 * 4) * width  # blocks twice, for the copies
    per_query = 4 * 2 * size * width
    keys, tables = layout.blocks_k * layout.block_k, 2 * 4 * width
    return keys * (unit * per_key + tables) + unit * layout.group * layout.block_q * per_query


def make_layout(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, dtype: Any) -> Layout:
    """Cut a call: all heads in a program if they fit, else equal parts of them that do, or one."""
    sizes = (queries, keys, heads, kv_heads, head_dim, block_size(queries), block_size(keys))
    layout = Layout(*sizes, unit=kv_heads)
    units = (unit for unit in range(kv_heads, 0, -1) if kv_heads % unit == 0)
    fitting = (unit for unit in units if _program_bytes(layout, unit, dtype) <= _ROOM)
    return dataclasses.replace(layout, unit=next(fitting, 1))


def visited_blocks(layout: Layout, runs_B2T: jax.Array, *, whole: bool = True) -> jax.Array:
    """Tabulate the blocks of keys of every block of queries: first, past the last, and those that need no mask.

    At least one block is visited, since the sum of what was visited is divided by.

    Args:
        layout: sizes.
        runs_B2T: int32 [B, 2, I block_q], padded by empty runs.
        whole: whether a block can do without a mask.

    Returns:
        int32 [B * I * 4]: first, past, and of the blocks without a mask first and past.
    """
    start_BIq, end_BIq = (runs_B2T[:, x].reshape(-1, layout.blocks_q, layout.block_q) for x in (0, 1))
    sees_BIq, size = start_BIq < end_BIq, layout.block_k
    first_BI = jnp.min(jnp.where(sees_BIq, start_BIq, layout.keys - 1), axis=2) // size
    past_BI = jnp.maximum(-(-jnp.max(jnp.where(sees_BIq, end_BIq, 0), axis=2) // size), first_BI + 1)
    full_BI = jnp.clip(-(-jnp.max(start_BIq, axis=2) // size), first_BI, past_BI)
    full_past_BI = jnp.clip(jnp.min(jnp.where(sees_BIq, end_BIq, 0), axis=2) // size, full_BI, past_BI)
    full_past_BI = full_past_BI if whole else full_BI
    return jnp.stack([first_BI, past_BI, full_BI, full_past_BI], axis=2).astype(jnp.int32).reshape(-1)


def flash_attention(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    runs_B2T: jax.Array,
    valid_BS: jax.Array | None,
    rotary: RotaryRows | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of every query over one run of keys, rotary first; on one device.

    Scores are scaled by H^-0.5 and normalised in float32. A row's keys and values are read once and stay in vector
    memory while its queries pass; blocks of keys that no query of a block sees are not multiplied. Where they do not
    fit, the parts of ``key_part`` are attended to one after another, and merged by the sums of their powers.

    Args:
        query_BTNH: queries before rotation; head n reads key/value head n // (N / K).
        keys_BSKH: keys before rotation.
        values_BSKH: values.
        runs_B2T: int32, the keys ``start <= s < end`` of every query.
        valid_BS: bool, keys that may be seen at all; None is all.
        rotary: of queries [B, H, T] and of keys [B, H, S] (``rotary_rows``); None where they are rotated already.
        interpret: run in Pallas' interpreter, on any device, for tests.

    Returns:
        [B, T, N, H] in the queries' dtype; an arbitrary finite value for a query without visible keys.
    """
    batch, queries, heads, width = query_BTNH.shape
    _, keys, kv_heads, _ = keys_BSKH.shape
    part = key_part(keys, width, query_BTNH.dtype)
    layout = make_layout(queries, part, heads, kv_heads, width, query_BTNH.dtype)
    runs_B2T = pad_axis(runs_B2T, 2, layout.block_q)  # queries that do not exist see nothing
    parts = []
    for start in range(0, keys, part):
        own, stop = dataclasses.replace(layout, keys=min(part, keys - start)), min(start + part, keys)
        masks = {"runs": jnp.clip(runs_B2T - start, 0, own.keys)}
        if valid_BS is not None:  # no block of keys is seen whole then
            masks["valid"] = pad_axis(valid_BS[:, start:stop].astype(jnp.int32)[:, None], 2, layout.block_k)
        if rotary is not None:
            masks |= {"table_q": rotary[0], "table_k": pad_axis(rotary[1][:, :, start:stop], 2, layout.block_k)}
        parts.append((visited_blocks(own, masks["runs"], whole=valid_BS is None), masks))
    flat = (x.transpose(0, 2, 3, 1).reshape(batch, -1, x.shape[1]) for x in (query_BTNH, keys_BSKH, values_BSKH))
    attention: Any = _attention
    out = attention(layout, keys, interpret, *flat, parts)
    return out.reshape(batch, heads, width, queries).transpose(0, 3, 1, 2)


def _specs(layout: Layout) -> dict[str, tuple[pl.BlockSpec, tuple[int, ...]]]:
    """Blocks of the arrays, and their shapes without the rows; the grid is rows, units of heads, blocks of queries."""
    width, group, unit = layout.head_dim, layout.group, layout.unit
    padded_q, padded_k = layout.blocks_q * layout.block_q, layout.blocks_k * layout.block_k
    units = layout.kv_heads // unit
    by_query = pl.BlockSpec((1, unit * group * width, layout.block_q), lambda b, u, i, *_: (b, u, i))
    by_key = pl.BlockSpec((1, unit * width, padded_k), lambda b, u, i, *_: (b, u, 0))
    along = lambda rows: pl.BlockSpec((1, rows, layout.block_q), lambda b, u, i, *_: (b, 0, i))  # noqa: E731
    whole = lambda rows: pl.BlockSpec((1, rows, padded_k), lambda b, u, i, *_: (b, 0, 0))  # noqa: E731
    lse = pl.BlockSpec((1, 1, unit * group, layout.block_q), lambda b, u, i, *_: (b, u, 0, i))
    query, key = (layout.heads * width, layout.queries), (layout.kv_heads * width, layout.keys)
    return {
        **dict.fromkeys(("q", "o", "g", "dq"), (by_query, query)),
        **dict.fromkeys(("k", "v", "dk", "dv"), (by_key, key)),
        "lse": (lse, (units, unit * group, padded_q)),
        "runs": (along(2), (2, padded_q)),
        "table_q": (along(width), (width, layout.queries)),
        "table_k": (whole(width), (width, padded_k)),
        "valid": (whole(1), (1, padded_k)),
    }


def _scratch(layout: Layout, dtype: Any, *, backward: bool, validity: bool) -> dict[str, Any]:
    width, blocks = layout.head_dim, (layout.unit, layout.blocks_k)
    keys, turned = (*blocks, layout.block_k, width), (*blocks, width, layout.block_k)
    rows = {"valid_s": ((layout.blocks_k, layout.block_k, _LANES), jnp.int32)} if validity else {}
    rows |= {"k_s": (keys, dtype)}
    if not backward:
        rows |= {"vT_s": (turned, dtype)}
    else:
        rows |= {"kT_s": (turned, dtype), "v_s": (keys, dtype)}
        rows |= dict.fromkeys(("dkT_s", "dvT_s"), (turned, jnp.float32))
    return {name: pltpu.VMEM(*of) for name, of in rows.items()}


def _call(layout: Layout, inputs: dict[str, jax.Array], blocks: jax.Array, outputs: Any, *, interpret: bool) -> Any:
    """Run the forward or the backward kernel on named arrays."""
    specs, batch, backward = _specs(layout), inputs["q"].shape[0], "dq" in outputs
    scratch = _scratch(layout, inputs["q"].dtype, backward=backward, validity="valid" in inputs)
    names = [*inputs, *outputs, *scratch]
    kernel = backward_kernel if backward else forward_kernel

    def body(blocks_ref: Any, *refs: Any) -> None:
        kernel(layout, blocks_ref, dict(zip(names, refs, strict=True)))

    grid = (batch, layout.kv_heads // layout.unit, layout.blocks_q)
    shape = lambda name, dtype: jax.ShapeDtypeStruct((batch, *specs[name][1]), dtype)  # noqa: E731
    return pl.pallas_call(
        body,
        name="mosaic_tpu_attention" + "_gradient" * backward,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs[name][0] for name in inputs],
            out_specs=[specs[name][0] for name in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape(name, dtype) for name, dtype in outputs.items()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
    )(blocks, *inputs.values())


def _parts(layout: Layout, keys: int, parts: Any) -> Iterator[tuple[Layout, slice, jax.Array, dict[str, jax.Array]]]:
    for index, (blocks, masks) in enumerate(parts):
        own = slice(index * layout.keys, min((index + 1) * layout.keys, keys))
        yield dataclasses.replace(layout, keys=own.stop - own.start), own, blocks, masks


def _merged(layout: Layout, outs: list[jax.Array], sums: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Merge what the parts of the keys gave, [B, N H, T] each, by log2 of the sums of their powers."""
    lse = functools.reduce(jnp.logaddexp2, sums)
    batch, by_head = lse.shape[0], (layout.heads, layout.head_dim, layout.queries)

    def weighted(out: jax.Array, own: jax.Array) -> jax.Array:
        shares = jnp.exp2(own - lse).reshape(batch, layout.heads, 1, -1)[..., : layout.queries]
        return out.reshape(batch, *by_head).astype(jnp.float32) * shares

    total = sum(map(weighted, outs, sums), start=jnp.zeros((), jnp.float32))
    return total.reshape(outs[0].shape).astype(outs[0].dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(layout, keys, interpret, q, k, v, parts):
    return _forward(layout, keys, interpret, q, k, v, parts)[0]


def _forward(layout, keys, interpret, q, k, v, parts):
    outs, sums = [], []
    for own, at, blocks, masks in _parts(layout, keys, parts):
        inputs = {"q": q, "k": k[:, :, at], "v": v[:, :, at], **masks}
        out, lse = _call(own, inputs, blocks, {"o": q.dtype, "lse": jnp.float32}, interpret=interpret)
        outs, sums = [*outs, out], [*sums, lse]
    out, lse = _merged(layout, outs, sums) if len(outs) > 1 else (outs[0], sums[0])
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, out, lse, parts)


def _backward(layout, keys, interpret, residuals, grad):
    q, k, v, out, lse, parts = residuals
    found = []
    for own, at, blocks, masks in _parts(layout, keys, parts):
        inputs = {"q": q, "k": k[:, :, at], "v": v[:, :, at], "o": out, "g": grad, "lse": lse, **masks}
        outputs = {"dq": q.dtype, "dk": k.dtype, "dv": v.dtype}
        found.append(_call(own, inputs, blocks, outputs, interpret=interpret))
    if len(found) == 1:
        return *found[0], None
    dqs, dks, dvs = zip(*found, strict=True)
    dq = sum((dq.astype(jnp.float32) for dq in dqs), start=jnp.zeros((), jnp.float32)).astype(q.dtype)
    return dq, jnp.concatenate(dks, axis=2), jnp.concatenate(dvs, axis=2), None


_attention.defvjp(_forward, _backward)

"""Flash attention for Hopper GPUs in Pallas (Mosaic GPU): causal, or every query over one run of keys.

It does what ``triton`` does on other GPUs, with the matrix instructions (wgmma) and the copy engine (TMA) of Hopper,
and plain causality as well. Memory is linear in the lengths; blocks that nothing needs are never read. The
gradient of keys and values is summed over grouped heads inside its kernel, and no gradient goes through float32 memory.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim, I tiles of queries,
J tiles of keys.

References:
    Shah et al., FlashAttention-3 (2024), for the division of work between warpgroups; the code is this project's own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from mor_jax.errors import require
from mor_jax.kernels.attention.hopper_kernels import forward_kernel, grad_keys_kernel, grad_queries_kernel
from mor_jax.kernels.attention.hopper_place import (
    ROWS,
    Shape,
    Tiles,
    key_items,
    plan_keys,
    plan_queries,
    query_items,
)
from mor_jax.kernels.attention.hopper_walk import programs
from mor_jax.kernels.attention.mask import NEVER
from mor_jax.kernels.hopper_launch import COPY_MULTIPLE, launch, tiled_smem
from mor_jax.kernels.padding import pad_axis
from mor_jax.mesh.devices import is_hopper

VECTOR_MULTIPLE = 128
"""Arrays of one value per query are padded to this, no block being longer: they are copied beyond a row's end."""


@dataclass(frozen=True)
class Tiling:
    """How the three kernels are cut."""

    forward: Tiles
    grad_queries: Tiles
    grad_keys: Tiles


TILINGS = {
    64: Tiling(Tiles(128, 3, 2, True), Tiles(64, 3, 3, True), Tiles(64, 2, 3, False)),
    128: Tiling(Tiles(64, 2, 2, True), Tiles(64, 2, 2, False), Tiles(64, 2, 2, False)),
}
"""By head_dim. For 64 the fastest that were measured on an H100; tiles of 128 need twice the registers."""


def is_available(dtype: str, head_dim: int) -> bool:
    """Whether this process's device is a Hopper GPU, and the kernels take such arrays."""
    return is_hopper() and dtype == "bfloat16" and head_dim in TILINGS


def flash_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    start_BT: jax.Array | None = None,
    end_BT: jax.Array | None = None,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Softmax attention of every query over the keys ``start <= s < end``; scores scaled by H^-0.5, in float32.

    Args:
        query_BTNH: bfloat16 queries; head n reads key/value head n // G. H is one of ``TILINGS``.
        key_BSKH: keys.
        value_BSKH: values.
        start_BT: int32, first key of each query; None is 0.
        end_BT: int32, one past its last key, at most S; None is t + 1 (causal, S = T). Skipping works best when both
            ascend; nothing else needs it.
        tiling: how the kernels are cut.
        interpret: parameters of Pallas' GPU interpreter, for tests on any device.

    Returns:
        [B, T, N, H] in the queries' dtype; 0 for a query without keys.

    Raises:
        UserError: an array that the kernels do not take.
    """
    _check(query_BTNH, key_BSKH, causal=end_BT is None)
    if start_BT is not None and end_BT is None:
        end_BT = jnp.broadcast_to(jnp.arange(1, query_BTNH.shape[1] + 1, dtype=jnp.int32)[None], start_BT.shape)
    length = query_BTNH.shape[1]
    run_padding = ((start_BT, NEVER), (end_BT, 0))
    runs = tuple(pad_axis(x, 1, VECTOR_MULTIPLE, value) for x, value in run_padding if x is not None)
    # queries without keys (causal ones are cut off), keys that no query sees
    tensors = (pad_axis(x, 1, COPY_MULTIPLE) for x in (query_BTNH, key_BSKH, value_BSKH))
    tiling = tiling or TILINGS[query_BTNH.shape[3]]
    attention: Any = _attention
    return attention(tiling, interpret, *tensors, runs)[:, :length]


def _check(query_BTNH: jax.Array, key_BSKH: jax.Array, *, causal: bool) -> None:
    (_, queries, heads, head_dim), (_, keys, kv_heads, _) = query_BTNH.shape, key_BSKH.shape
    require(query_BTNH.dtype == jnp.bfloat16, f"attention on Hopper: dtype={query_BTNH.dtype} must be bfloat16")
    require(head_dim in TILINGS, f"attention on Hopper: head_dim={head_dim} must be one of {tuple(TILINGS)}")
    require(heads % kv_heads == 0, f"attention on Hopper: {heads} heads must be a multiple of {kv_heads} key heads")
    require(not causal or queries == keys, f"attention on Hopper: {queries} causal queries, but {keys} keys")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(tiling: Tiling, interpret: Any, query: Any, key: Any, value: Any, runs: Any) -> jax.Array:
    return _forward(tiling, interpret, query, key, value, runs)[0]


def _forward(tiling: Tiling, interpret: Any, query: Any, key: Any, value: Any, runs: Any) -> tuple[jax.Array, Any]:
    out, lse = forward(tiling.forward, interpret, query, key, value, runs)
    return out, (query, key, value, runs, out, lse)


def _backward(tiling: Tiling, interpret: Any, residuals: Any, grad_out: jax.Array) -> Any:
    query, key, value, runs, out, lse = residuals
    grad_query, delta = grad_queries(tiling.grad_queries, interpret, query, key, value, runs, grad_out, out, lse)
    grads = grad_keys(tiling.grad_keys, interpret, query, key, value, runs, grad_out, lse, delta)
    return grad_query, *grads, tuple(None for _ in runs)


_attention.defvjp(_forward, _backward)


def _shape(query: jax.Array, key: jax.Array, runs: Any) -> Shape:
    batch, length, heads, width = query.shape
    return Shape(batch, length, key.shape[1], heads, key.shape[2], width, len(runs))


def _vector(dtype: Any, *shape: int) -> Any:
    return plgpu.SMEM(shape, dtype)


def _call(
    kernel: Callable[..., None], name: str, items: int, shape: Shape, tiles: Tiles, interpret: Any, **parts: Any
) -> Any:
    """Run a kernel on ``items`` of work; ``parts``: its operands, out types and scratch."""
    staging = () if interpret is None else (_vector(jnp.bfloat16, tiles.warpgroups, ROWS, tiles.block_rows),)

    def body(*refs: Any, scratch: Any, staging: Any) -> None:
        kernel(shape, tiles, refs, scratch, *staging)

    return launch(
        body,
        name,
        operands=parts["operands"],
        out=parts["out"],
        scratch={"scratch": parts["scratch"], "staging": staging},
        programs=programs(tiles, items),
        warpgroups=tiles.warpgroups,
        interpret=interpret,
    )


def _barriers(tiles: Tiles, own: int, walked: int) -> tuple[Any, Any, Any]:
    """Barriers: (a buffer is filled, by ``own`` copies for each warpgroup; it is free again), a slot is filled, by
    ``walked`` copies; it is free again."""

    def barrier(arrivals: int, count: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    computing = tiles.warpgroups
    return (
        (barrier(computing * own, tiles.buffers), barrier(computing, tiles.buffers)),
        barrier(walked, tiles.stages),
        barrier(computing, tiles.stages),
    )


def _lengthened(shape: Shape) -> jax.ShapeDtypeStruct:
    """Values of queries [B, N, T'], T' a multiple of ``VECTOR_MULTIPLE``."""
    length = -(-shape.queries // VECTOR_MULTIPLE) * VECTOR_MULTIPLE
    return jax.ShapeDtypeStruct((shape.batch, shape.heads, length), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(tiles: Tiles, interpret: Any, query: Any, key: Any, value: Any, runs: Any) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H], and the base-2 logarithm of the softmax sums, float32 [B, N, T']: 1e30 without keys."""
    shape, dtype, rows = _shape(query, key, runs), query.dtype, (tiles.warpgroups, ROWS)
    own_rows = tiled_smem(dtype, tiles.buffers, *rows, shape.width)
    block = tiled_smem(dtype, tiles.stages, tiles.block_rows, shape.width)
    run_rows = (_vector(jnp.int32, tiles.buffers, *rows),) * shape.runs
    own, filled, freed = _barriers(tiles, 1 + shape.runs, 1)
    return _call(
        forward_kernel,
        "mor_hopper_attention_forward",
        query_items(shape, tiles),
        shape,
        tiles,
        interpret,
        operands=(query, key, value, runs, plan_queries(runs, tiles) if runs else None),
        out=(jax.ShapeDtypeStruct(query.shape, dtype), _lengthened(shape)),
        scratch=(own_rows, block, block, _vector(jnp.float32, *rows), run_rows, own, (filled,) * 2, (freed,) * 2),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def grad_queries(
    tiles: Tiles, interpret: Any, query: Any, key: Any, value: Any, runs: Any, grad_out: Any, out: Any, lse: Any
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the queries, and the products of output and its gradient, float32 [B, N, T']."""
    shape, dtype, rows = _shape(query, key, runs), query.dtype, (tiles.warpgroups, ROWS)
    own_rows = tiled_smem(dtype, tiles.buffers, *rows, shape.width)
    block = tiled_smem(dtype, tiles.stages, tiles.block_rows, shape.width)
    own_values, run_rows = (_vector(kind, tiles.buffers, *rows) for kind in (jnp.float32, jnp.int32))
    return _call(
        grad_queries_kernel,
        "mor_hopper_attention_grad_queries",
        query_items(shape, tiles),
        shape,
        tiles,
        interpret,
        operands=(query, key, value, runs, plan_queries(runs, tiles) if runs else None, grad_out, out, lse),
        out=(jax.ShapeDtypeStruct(query.shape, dtype), _lengthened(shape)),
        scratch=(
            *(own_rows, own_rows, own_rows, own_values, _vector(jnp.float32, *rows), block, block),
            *((run_rows,) * shape.runs, *_barriers(tiles, 4 + shape.runs, 2)),
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def grad_keys(
    tiles: Tiles, interpret: Any, query: Any, key: Any, value: Any, runs: Any, grad_out: Any, lse: Any, delta: Any
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values [B, S, K, H]."""
    shape, dtype, walked = _shape(query, key, runs), query.dtype, (tiles.stages, tiles.block_rows)
    rows = tiled_smem(dtype, tiles.buffers, tiles.warpgroups, ROWS, shape.width)
    block = tiled_smem(dtype, *walked, shape.width)
    values, run_rows = _vector(jnp.float32, *walked), (_vector(jnp.int32, *walked),) * shape.runs
    plan = plan_keys(runs, tiles, shape.keys) if runs else None
    return _call(
        grad_keys_kernel,
        "mor_hopper_attention_grad_keys",
        key_items(shape, tiles),
        shape,
        tiles,
        interpret,
        operands=(query, key, value, runs, plan, grad_out, lse, delta),
        out=(jax.ShapeDtypeStruct(key.shape, dtype),) * 2,
        scratch=(rows, rows, block, block, values, values, run_rows, *_barriers(tiles, 2, 4 + shape.runs)),
    )

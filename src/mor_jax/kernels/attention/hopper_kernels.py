"""The three Pallas (Mosaic GPU) kernels behind ``hopper.flash_attention``; letters as there.

Of a thread block's warpgroups the last one only asks the copy engine (TMA) for the next blocks. The engine reads rows
of tensors beyond an array's end as zeros, and does not write them. Vectors, one value per query, it copies without a
look at a row's end: they are padded, and a warpgroup whose tile does not exist must not write them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mor_jax.kernels.attention.hopper_place import (
    ROWS,
    Shape,
    Tiles,
    WarpgroupPlace,
    key_items,
    place_keys,
    place_queries,
    query_items,
    visible,
)
from mor_jax.kernels.attention.hopper_walk import Copy, over_keys, over_queries, work

_LOG2_E = math.log2(math.e)
_MASKED = -1e30


def _product(a: Any, b: Any, columns: int) -> jax.Array:
    """Matrix product [ROWS, columns] in float32; ``a`` in shared memory or registers."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))


def _operand(x: jax.Array, staging: Any) -> Any:
    """``x`` for a product: from registers, or through shared memory for the interpreter, which knows no other way."""
    if staging is None:
        return x
    ref = staging.at[lax.axis_index("wg")]
    ref[...] = x
    return ref


def _rows(values: jax.Array, columns: int) -> jax.Array:
    """One value per row of a tile [ROWS, columns]."""
    return lax.broadcast_in_dim(values, (ROWS, columns), [0])


def _columns(values: jax.Array) -> jax.Array:
    """One value per column of a tile [ROWS, columns]."""
    return lax.broadcast_in_dim(values, (ROWS, values.shape[0]), [1])


def _copy_own(pairs: list[tuple[Any, Any]], ranges: list[tuple[Any, Any]]) -> Copy:
    """What copies a warpgroup's rows of [B, T, N, H] arrays and of [B, N, T] or [B, T] ``ranges``."""

    def copy(place: WarpgroupPlace, wg: Any, buffer: Any, barrier: Any) -> None:
        for ref, smem in pairs:
            plgpu.copy_gmem_to_smem(ref.at[place.batch, place.rows, place.head], smem.at[buffer, wg], barrier)
        for ref, smem in ranges:
            source = ref.at[place.batch] if len(ref.shape) == 2 else ref.at[place.batch, place.head]
            plgpu.copy_gmem_to_smem(source.at[place.rows], smem.at[buffer, wg], barrier)

    return copy


def _copy_keys(tiles: Tiles, pairs: list[tuple[Any, Any]]) -> Copy:
    """What copies a step's block of keys (and values), the last block first."""

    def copy(place: WarpgroupPlace, step: Any, slot: Any, barrier: Any) -> None:
        rows = pl.ds((place.stop - 1 - step) * tiles.block_rows, tiles.block_rows)
        for ref, smem in pairs:
            plgpu.copy_gmem_to_smem(ref.at[place.batch, rows, place.kv_head], smem.at[slot], barrier)

    return copy


def _store_queries(shape: Shape, place: WarpgroupPlace, tensor: tuple[Any, Any], vector: tuple[Any, Any]) -> None:
    """Write a tile [ROWS, H] and a value per row, each (in shared memory, in memory), and wait until they are there."""
    plgpu.commit_smem()

    @pl.when(place.tile * ROWS < shape.queries)  # else the next head's first values would be written over
    def _() -> None:
        plgpu.copy_smem_to_gmem(tensor[0], tensor[1].at[place.batch, place.rows, place.head])
        plgpu.copy_smem_to_gmem(vector[0], vector[1].at[place.batch, place.head, place.rows])

    plgpu.wait_smem_to_gmem(0)


def _copy_queries(shape: Shape, tiles: Tiles, pairs: list[Any], values: list[Any], runs: list[Any]) -> Copy:
    """What copies a step's block of queries: of [B, T, N, H] arrays, of [B, N, T] and of [B, T] ones."""

    def copy(place: WarpgroupPlace, step: Any, slot: Any, barrier: Any) -> None:
        count = place.stop - place.begin
        head = place.kv_head * shape.groups + lax.div(step, count)
        rows = pl.ds((place.begin + lax.rem(step, count)) * tiles.block_rows, tiles.block_rows)
        for ref, smem in pairs:
            plgpu.copy_gmem_to_smem(ref.at[place.batch, rows, head], smem.at[slot], barrier)
        for ref, smem in values:
            plgpu.copy_gmem_to_smem(ref.at[place.batch, head, rows], smem.at[slot], barrier)
        for ref, smem in runs:
            plgpu.copy_gmem_to_smem(ref.at[place.batch, rows], smem.at[slot], barrier)

    return copy


def forward_kernel(shape: Shape, tiles: Tiles, refs: Any, scratch: Any, staging: Any = None) -> None:
    """Write the output of a tile of queries per warpgroup, and the base-2 logarithm of its softmax sums."""
    query_ref, key_ref, value_ref, run_refs, plan_ref, out_ref, lse_ref = refs
    query_smem, key_smem, value_smem, lse_smem, run_smem, own, filled, freed = scratch
    wg, scale = lax.axis_index("wg"), shape.width**-0.5 * _LOG2_E
    both = list(zip(filled, freed, strict=True))

    def compute(place: WarpgroupPlace, buffer: Any, done: Any) -> None:
        query, runs = query_smem.at[buffer, wg], [smem.at[buffer, wg][...] for smem in run_smem]

        def step(index: Any, block: Any, carry: Any, *, masked: bool) -> Any:
            sums, top, total = carry
            slot = lax.rem(index, tiles.stages)
            plgpu.barrier_wait(filled[0].at[slot])
            scores = _product(query, key_smem.at[slot].transpose((1, 0)), tiles.block_rows)
            plgpu.barrier_arrive(freed[0].at[slot])
            mask = (
                visible(place.tile * ROWS, block * tiles.block_rows, runs, (ROWS, tiles.block_rows), 0)
                if masked
                else None
            )
            if mask is not None:
                scores = jnp.where(mask, scores, _MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores * scale - _rows(new_top, tiles.block_rows))
            if mask is not None and runs:  # a query may see nothing of a block
                weights = jnp.where(mask, weights, 0.0)
            total = total * shrink + jnp.sum(weights, axis=1)
            weights = weights.astype(query_ref.dtype)
            plgpu.barrier_wait(filled[1].at[slot])
            more = _product(_operand(weights, staging), value_smem.at[slot], shape.width)
            plgpu.barrier_arrive(freed[1].at[slot])
            return sums * _rows(shrink, shape.width) + more, new_top, total

        carry = (
            jnp.zeros((ROWS, shape.width), jnp.float32),
            jnp.full((ROWS,), _MASKED, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
        )
        sums, top, total = over_keys(shape, tiles, place, both, done, step, carry)
        if runs:  # without keys the output is 0, and so is every weight that the gradients take from this query
            top = jnp.where(total > 0, top, -_MASKED)
            total = jnp.where(total > 0, total, 1.0)
        query[...] = (sums / _rows(total, shape.width)).astype(query_ref.dtype)
        lse_smem.at[wg][...] = top + jnp.log2(total)
        _store_queries(shape, place, (query, out_ref), (lse_smem.at[wg], lse_ref))

    pairs = [(key_ref, key_smem), (value_ref, value_smem)]
    work(
        tiles,
        query_items(shape, tiles),
        functools.partial(place_queries, shape, tiles, plan_ref),
        (*own, _copy_own([(query_ref, query_smem)], list(zip(run_refs, run_smem, strict=True)))),
        [(*barriers, _copy_keys(tiles, [pair])) for barriers, pair in zip(both, pairs, strict=True)],
        compute,
    )


def grad_queries_kernel(shape: Shape, tiles: Tiles, refs: Any, scratch: Any, staging: Any = None) -> None:
    """Write the gradient of a tile of queries per warpgroup, and each query's product of output and its gradient."""
    query_ref, key_ref, value_ref, run_refs, plan_ref, grad_out_ref, out_ref, lse_ref, grad_ref, delta_ref = refs
    query_smem, grad_out_smem, out_smem, lse_smem, delta_smem, key_smem, value_smem, run_smem, *barriers = scratch
    own, filled, freed = barriers
    wg, scale = lax.axis_index("wg"), shape.width**-0.5 * _LOG2_E

    def compute(place: WarpgroupPlace, buffer: Any, done: Any) -> None:
        query, grad_out = query_smem.at[buffer, wg], grad_out_smem.at[buffer, wg]
        runs, lse = [smem.at[buffer, wg][...] for smem in run_smem], lse_smem.at[buffer, wg][...]
        out = out_smem.at[buffer, wg][...].astype(jnp.float32)
        delta = jnp.sum(out * grad_out[...].astype(jnp.float32), axis=1)
        delta_smem.at[wg][...] = delta

        def walk(grad_acc: Any) -> jax.Array:
            def step(index: Any, block: Any, carry: Any, *, masked: bool) -> Any:
                slot = lax.rem(index, tiles.stages)
                plgpu.barrier_wait(filled.at[slot])

                def products(scores_acc: Any, grad_weights_acc: Any) -> jax.Array:
                    plgpu.wgmma(scores_acc, query, key_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(grad_weights_acc, grad_out, value_smem.at[slot].transpose((1, 0)))
                    scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                    weights = jnp.exp2(scores * scale - _rows(lse, tiles.block_rows))
                    if masked:
                        mask = visible(place.tile * ROWS, block * tiles.block_rows, runs, (ROWS, tiles.block_rows), 0)
                        weights = jnp.where(mask, weights, 0.0)
                    return weights * (grad_weights_acc[...] - _rows(delta, tiles.block_rows))

                accumulator = plgpu.ACC((ROWS, tiles.block_rows), jnp.float32)
                grad_scores = pl.run_scoped(products, accumulator, accumulator).astype(query_ref.dtype)
                plgpu.wgmma(grad_acc, _operand(grad_scores, staging), key_smem.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(freed.at[slot])
                return carry

            over_keys(shape, tiles, place, [(filled, freed)], done, step, ())
            return grad_acc[...]

        grad = pl.run_scoped(walk, plgpu.ACC((ROWS, shape.width), jnp.float32))
        query[...] = (grad * shape.width**-0.5).astype(query_ref.dtype)
        _store_queries(shape, place, (query, grad_ref), (delta_smem.at[wg], delta_ref))

    tensors = [(query_ref, query_smem), (grad_out_ref, grad_out_smem), (out_ref, out_smem)]
    work(
        tiles,
        query_items(shape, tiles),
        functools.partial(place_queries, shape, tiles, plan_ref),
        (*own, _copy_own(tensors, [(lse_ref, lse_smem), *zip(run_refs, run_smem, strict=True)])),
        [(filled, freed, _copy_keys(tiles, [(key_ref, key_smem), (value_ref, value_smem)]))],
        compute,
    )


def grad_keys_kernel(shape: Shape, tiles: Tiles, refs: Any, scratch: Any, staging: Any = None) -> None:
    """Write the gradients of a tile of keys and of values per warpgroup, summed over the heads that read them."""
    query_ref, key_ref, value_ref, run_refs, plan_ref, grad_out_ref, lse_ref, delta_ref, *grad_refs = refs
    key_smem, value_smem, query_smem, grad_out_smem, lse_smem, delta_smem, run_smem, own, filled, freed = scratch
    wg, scale = lax.axis_index("wg"), shape.width**-0.5 * _LOG2_E

    def compute(place: WarpgroupPlace, buffer: Any, done: Any) -> None:
        key, value = key_smem.at[buffer, wg], value_smem.at[buffer, wg]

        def add(grad_key_acc: Any, grad_value_acc: Any, index: Any, block: Any, *, masked: bool) -> None:
            slot = lax.rem(index, tiles.stages)
            plgpu.barrier_wait(filled.at[slot])
            query, grad_out = query_smem.at[slot], grad_out_smem.at[slot]
            lse, delta = lse_smem.at[slot][...], delta_smem.at[slot][...]

            def products(scores_acc: Any, grad_weights_acc: Any) -> None:
                plgpu.wgmma(scores_acc, key, query.transpose((1, 0)))
                plgpu.wgmma(grad_weights_acc, value, grad_out.transpose((1, 0)))
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                weights = jnp.exp2(scores * scale - _columns(lse))
                if masked:
                    runs = [smem.at[slot][...] for smem in run_smem]
                    mask = visible(block * tiles.block_rows, place.tile * ROWS, runs, (ROWS, tiles.block_rows), 1)
                    weights = jnp.where(mask, weights, 0.0)
                plgpu.wgmma(grad_value_acc, _operand(weights.astype(query_ref.dtype), staging), grad_out)
                grad_weights = plgpu.wgmma_accumulator_load(grad_weights_acc, wait_n=1)
                grad_scores = (weights * (grad_weights - _columns(delta))).astype(query_ref.dtype)
                plgpu.wgmma(grad_key_acc, _operand(grad_scores, staging), query)
                plgpu.wgmma_wait(0)

            accumulator = plgpu.ACC((ROWS, tiles.block_rows), jnp.float32)
            pl.run_scoped(products, accumulator, accumulator)
            plgpu.barrier_arrive(freed.at[slot])

        def walk(grad_key_acc: Any, grad_value_acc: Any) -> tuple[jax.Array, jax.Array]:
            step = functools.partial(add, grad_key_acc, grad_value_acc)
            over_queries(shape, tiles, place, [(filled, freed)], done, step)
            return grad_key_acc[...], grad_value_acc[...]

        accumulator = plgpu.ACC((ROWS, shape.width), jnp.float32)
        grad_key, grad_value = pl.run_scoped(walk, accumulator, accumulator)
        key[...] = (grad_key * shape.width**-0.5).astype(query_ref.dtype)
        value[...] = grad_value.astype(query_ref.dtype)
        plgpu.commit_smem()
        for smem, ref in zip((key, value), grad_refs, strict=True):
            plgpu.copy_smem_to_gmem(smem, ref.at[place.batch, place.rows, place.kv_head])
        plgpu.wait_smem_to_gmem(0)

    pairs, values = (
        [(query_ref, query_smem), (grad_out_ref, grad_out_smem)],
        [(lse_ref, lse_smem), (delta_ref, delta_smem)],
    )
    runs = list(zip(run_refs, run_smem, strict=True))
    work(
        tiles,
        key_items(shape, tiles),
        functools.partial(place_keys, shape, tiles, plan_ref),
        (*own, _copy_own([(key_ref, key_smem), (value_ref, value_smem)], [])),
        [(filled, freed, _copy_queries(shape, tiles, pairs, values, runs))],
        compute,
    )

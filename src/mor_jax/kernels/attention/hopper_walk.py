"""How a kernel of ``hopper`` takes its work: warpgroups that compute, and one that copies for them.

All computing warpgroups of a thread block walk over the same blocks; one passes over those that only its neighbours
need. In a persistent kernel a thread block takes items of work in turn, and the rows of the next one are copied
meanwhile. Letters as in ``hopper``.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mor_jax.kernels.attention.hopper_place import Shape, Tiles, WarpgroupPlace
from mor_jax.kernels.hopper_launch import REGISTERS
from mor_jax.mesh.devices import multiprocessors


def programs(tiles: Tiles, items: int) -> int:
    """Thread blocks of a kernel on this process's GPU; on an H100 where there is none."""
    return min(items, multiprocessors()) if tiles.persistent else items


Copy = Callable[[WarpgroupPlace, Any, Any, Any], None]
"""Asks for the rows of a place: a warpgroup's own into a buffer, or a step's block into a slot, and a barrier."""


def work(
    tiles: Tiles,
    items: int,
    place: Callable[[Any, Any], WarpgroupPlace],
    own: tuple[Any, Any, Copy],
    walked: list[tuple[Any, Any, Copy]],
    compute: Callable[[WarpgroupPlace, Any, Any], None],
) -> None:
    """The body of a kernel.

    Args:
        tiles: how it is cut.
        items: of work.
        place: of (item, warpgroup).
        own: barriers of filled and of freed buffers, and what copies (place, warpgroup, buffer, barrier).
        walked: per set of slots the barriers of filled and of freed ones, and what copies (place, step, slot, barrier).
        compute: one item of a warpgroup: (place, buffer, steps of the items before).
    """
    wg, first, count = lax.axis_index("wg"), lax.axis_index("block"), programs(tiles, items)
    turns = lax.div(items - first + count - 1, count)
    filled, freed, copy_own = own

    @pl.when(wg < tiles.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[tiles.warpgroups][0], action="increase")

        def one(turn: Any, done: Any) -> Any:
            here, buffer = place(first + turn * count, wg), lax.rem(turn, tiles.buffers)
            plgpu.barrier_wait(filled.at[buffer])
            compute(here, buffer, done)
            plgpu.barrier_arrive(freed.at[buffer])
            return done + here.steps

        lax.fori_loop(0, turns, one, jnp.int32(0))

    @pl.when(wg == tiles.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(REGISTERS[tiles.warpgroups][1], action="decrease")

        def one(turn: Any, done: Any) -> Any:
            item, buffer = first + turn * count, lax.rem(turn, tiles.buffers)
            pl.when(turn >= tiles.buffers)(lambda: plgpu.barrier_wait(freed.at[buffer]))
            for index in range(tiles.warpgroups):
                copy_own(place(item, index), index, buffer, filled.at[buffer])
            here = place(item, 0)
            _copy_blocks(tiles, here, done, walked)
            return done + here.steps

        lax.fori_loop(0, turns, one, jnp.int32(0))


def _copy_blocks(tiles: Tiles, place: WarpgroupPlace, done: Any, walked: list[tuple[Any, Any, Copy]]) -> None:
    """For every step, as its slots fall free, ask for what the others will read."""

    @pl.loop(0, place.steps)
    def _step(step: Any) -> None:
        slot = lax.rem(done + step, tiles.stages)
        for filled, freed, copy in walked:
            pl.when(done + step >= tiles.stages)(lambda freed=freed: plgpu.barrier_wait(freed.at[slot]))
            copy(place, step, slot, filled.at[slot])


def pass_over(tiles: Tiles, start: Any, stop: Any, barriers: list[tuple[Any, Any]]) -> None:
    """Steps (counted over all items) that only other warpgroups need."""

    @pl.loop(start, stop)
    def _step(step: Any) -> None:
        slot = lax.rem(step, tiles.stages)
        for filled, freed in barriers:
            plgpu.barrier_wait(filled.at[slot])
            plgpu.barrier_arrive(freed.at[slot])


def over_keys(
    shape: Shape,
    tiles: Tiles,
    place: WarpgroupPlace,
    barriers: list[tuple[Any, Any]],
    done: Any,
    step: Callable[..., Any],
    carry: Any,
) -> Any:
    """Walk over a tile's blocks of keys, from the last to the first, with a mask where one is needed.

    Args:
        shape: lengths.
        tiles: how the kernel is cut.
        place: of the warpgroup.
        barriers: (of filled, of freed) slots.
        done: steps of the items before.
        step: function of the step over all items, the block, the carry and ``masked``.
        carry: to begin with.
    """
    span = place.span

    def at(block: Any) -> Any:
        """The step after which the blocks from this one on are done."""
        return done + place.stop - block

    def masked(index: Any, carry: Any) -> Any:
        return step(index, at(index) - 1, carry, masked=True)

    def plain(index: Any, carry: Any) -> Any:
        return step(index, at(index) - 1, carry, masked=False)

    pass_over(tiles, done, at(span.last), barriers)
    carry = lax.fori_loop(at(span.last), at(span.rest), masked, carry)
    carry = lax.fori_loop(at(span.rest), at(span.whole), plain, carry)
    if shape.runs == 2:
        carry = lax.fori_loop(at(span.whole), at(span.first), masked, carry)
    if shape.runs:
        pass_over(tiles, at(span.first), at(place.begin), barriers)
    return carry


def over_queries(
    shape: Shape,
    tiles: Tiles,
    place: WarpgroupPlace,
    barriers: list[tuple[Any, Any]],
    done: Any,
    step: Callable[..., None],
) -> None:
    """Walk over a tile's blocks of queries, head by head, from the first to the last, with a mask where one is needed.

    Args:
        shape: lengths.
        tiles: how the kernel is cut.
        place: of the warpgroup.
        barriers: (of filled, of freed) slots.
        done: steps of the items before.
        step: function of the step over all items, the block and ``masked``.
    """
    span = place.span

    @pl.loop(0, shape.groups)
    def _head(head: Any) -> None:
        start = done + head * (place.stop - place.begin)
        offset = start - place.begin  # step = offset + block

        def over(first: Any, last: Any, masked: bool) -> None:
            pl.loop(first, last)(lambda block: step(offset + block, block, masked=masked))

        pass_over(tiles, start, offset + span.first, barriers)
        over(span.first, span.whole, True)
        over(span.whole, span.rest, False)
        if shape.runs == 2:
            over(span.rest, span.last, True)
        pass_over(tiles, offset + span.last, offset + place.stop, barriers)

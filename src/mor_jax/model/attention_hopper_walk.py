"""What the kernels of ``attention_hopper`` walk over: which blocks of keys (or queries) a tile needs, and their masks.

A thread block has several warpgroups that compute, each with a tile of its own, and one that copies. All walk over the
same blocks; a warpgroup passes over those that only its neighbours need. Where there are fewer thread blocks than items
of work they take them in turn, and the rows of the next item are copied meanwhile. Letters as in ``attention_hopper``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows of a warpgroup's tile: what one wgmma instruction takes."""
NEVER = 2**30
"""First key of queries that do not exist: 0 would make their tile read all keys from the first."""


REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}
"""By the number of computing warpgroups: registers per thread of those, and of the one that copies."""


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut."""

    walked: int
    """Rows of a block that is walked over."""
    warpgroups: int
    """Warpgroups that compute."""
    stages: int
    """Blocks in flight."""
    in_turn: bool
    """Whether a thread block per multiprocessor takes items in turn, rather than a thread block per item."""

    @property
    def buffers(self) -> int:
        """Items whose rows are in shared memory."""
        return 2 if self.in_turn else 1


@dataclass(frozen=True)
class Shape:
    """Lengths of the arrays; ``runs`` counts the arrays that bound each query's keys: 0 (plain causality), 1 or 2."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    runs: int

    @property
    def groups(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Span:
    """Blocks [first, whole) and [rest, last) need a mask, [whole, rest) does not; int32 scalars, or arrays of them."""

    first: Any
    whole: Any
    rest: Any
    last: Any


@dataclass(frozen=True)
class Place:
    """Where a warpgroup works, int32 scalars; ``begin`` and ``stop`` bound the blocks that the thread block walks."""

    batch: Any
    kv_head: Any
    head: Any
    tile: Any
    span: Span
    begin: Any
    stop: Any
    steps: Any
    """Blocks of all walks: of one, or of one per head of the group."""

    @property
    def rows(self) -> Any:
        """The tile's rows."""
        return pl.ds(self.tile * ROWS, ROWS)


def query_items(shape: Shape, tiles: Tiles) -> int:
    """Items of work where a warpgroup has a tile of queries of one head."""
    return shape.batch * shape.kv_heads * pl.cdiv(pl.cdiv(shape.queries, ROWS) * shape.groups, tiles.warpgroups)


def key_items(shape: Shape, tiles: Tiles) -> int:
    """Items of work where a warpgroup has a tile of keys."""
    return shape.batch * shape.kv_heads * pl.cdiv(pl.cdiv(shape.keys, ROWS), tiles.warpgroups)


def place_queries(shape: Shape, tiles: Tiles, plan_ref: Any, item: Any, wg: Any) -> Place:
    """The place of a warpgroup. Those of an item have the heads of a group, which read the same keys.

    Items with the longest walk come first, of all rows: those that run together take about as long, and all keys and
    values fit the cache.
    """
    pairs = shape.batch * shape.kv_heads
    block, pair = query_items(shape, tiles) // pairs - 1 - lax.div(item, pairs), lax.rem(item, pairs)
    batch, kv_head = lax.div(pair, shape.kv_heads), lax.rem(pair, shape.kv_heads)
    unit = block * tiles.warpgroups

    def span(unit: Any) -> Span:
        tile = lax.div(unit, shape.groups)
        if plan_ref is None:
            rest = lax.div(tile * ROWS, tiles.walked)
            return Span(0, 0, rest, jnp.minimum(rest + 1, pl.cdiv(shape.keys, tiles.walked)))
        return _read(plan_ref, batch, tile, shape.queries)

    own = unit + wg
    head = kv_head * shape.groups + lax.rem(own, shape.groups)
    begin, stop = _bounds([span(unit + i) for i in range(tiles.warpgroups)])
    return Place(batch, kv_head, head, lax.div(own, shape.groups), span(own), begin, stop, stop - begin)


def place_keys(shape: Shape, tiles: Tiles, plan_ref: Any, item: Any, wg: Any) -> Place:
    """The place of a warpgroup. A row's items come one after the other: else their queries do not fit the cache."""
    blocks = key_items(shape, tiles) // (shape.batch * shape.kv_heads)
    pair, block = lax.div(item, blocks), lax.rem(item, blocks)
    batch, kv_head = lax.div(pair, shape.kv_heads), lax.rem(pair, shape.kv_heads)

    def span(tile: Any) -> Span:
        if plan_ref is None:
            last = pl.cdiv(shape.queries, tiles.walked)
            first = jnp.minimum(lax.div(tile * ROWS, tiles.walked), last)
            return Span(first, jnp.minimum(first + 1, last), last, last)
        return _read(plan_ref, batch, tile, shape.keys)

    tile = block * tiles.warpgroups
    begin, stop = _bounds([span(tile + i) for i in range(tiles.warpgroups)])
    steps = shape.groups * (stop - begin)
    return Place(batch, kv_head, kv_head, tile + wg, span(tile + wg), begin, stop, steps)


def _read(plan_ref: Any, batch: Any, tile: Any, length: int) -> Span:
    """Read a tile's span; warpgroups beyond the last tile read the last one's, and what they compute is not written."""
    tile = jnp.minimum(tile, pl.cdiv(length, ROWS) - 1)
    return Span(*(plan_ref[batch, tile, i] for i in range(4)))


def _bounds(spans: list[Span]) -> tuple[Any, Any]:
    begin, stop = spans[0].first, spans[0].last
    for span in spans[1:]:
        begin, stop = jnp.minimum(begin, span.first), jnp.maximum(stop, span.last)
    return begin, stop


def _tiled(x_BT: jax.Array, size: int, value: int) -> jax.Array:
    """[B, tiles, size], the missing rows filled."""
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % size)), constant_values=value)
    return x_BT.reshape(x_BT.shape[0], -1, size)


def plan_queries(runs: tuple[jax.Array, ...], tiles: Tiles) -> jax.Array:
    """int32 [B, tiles of queries, 4]: the span of blocks of keys of every tile."""
    end = _tiled(runs[-1], ROWS, 0)
    last, rest = pl.cdiv(end.max(axis=2), tiles.walked), end.min(axis=2) // tiles.walked
    first = whole = jnp.zeros_like(last)
    if len(runs) == 2:
        start = _tiled(runs[0], ROWS, NEVER)
        first, whole = start.min(axis=2) // tiles.walked, pl.cdiv(start.max(axis=2), tiles.walked)
    first, whole = jnp.minimum(first, last), jnp.minimum(whole, last)
    return jnp.stack([first, whole, jnp.maximum(rest, whole), last], axis=2)


def plan_keys(runs: tuple[jax.Array, ...], tiles: Tiles, keys: int) -> jax.Array:
    """int32 [B, tiles of keys, 4]: the span of blocks of queries of every tile, all of them with a mask."""
    end = _tiled(runs[-1], tiles.walked, 0)
    lowest = ROWS * jnp.arange(pl.cdiv(keys, ROWS), dtype=jnp.int32)[None, :, None]
    needed_BJI = end.max(axis=2)[:, None, :] > lowest
    if len(runs) == 2:
        needed_BJI &= _tiled(runs[0], tiles.walked, NEVER).min(axis=2)[:, None, :] < lowest + ROWS
    index = jnp.arange(end.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(needed_BJI, index + 1, 0), axis=2)
    first = jnp.minimum(jnp.min(jnp.where(needed_BJI, index, end.shape[1]), axis=2), last)
    return jnp.stack([first, last, last, last], axis=2)


def visible(query: Any, key: Any, runs: list[jax.Array], shape: tuple[int, int], query_axis: int) -> jax.Array:
    """bool [shape]: which pairs of a tile may meet.

    Args:
        query: row of the first query.
        key: row of the first key.
        runs: (start, end) or (end,) of the tile's queries; empty for key row <= query row.
        shape: of the tile.
        query_axis: axis of the queries.
    """
    key = key + lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    if not runs:
        return key <= query + lax.broadcasted_iota(jnp.int32, shape, query_axis)
    bounds = [lax.broadcast_in_dim(x, shape, [query_axis]) for x in runs]
    mask = key < bounds[-1]
    return mask & (key >= bounds[0]) if len(bounds) == 2 else mask


def programs(tiles: Tiles, items: int) -> int:
    """Thread blocks of a kernel on this process's GPU; on an H100 where there is none."""
    multiprocessors = getattr(jax.devices()[0], "core_count", None) or 132
    return min(items, multiprocessors) if tiles.in_turn else items


Copy = Callable[[Place, Any, Any, Any], None]
"""Asks for the rows of a place: a warpgroup's own into a buffer, or a step's block into a slot, and a barrier."""


def work(
    tiles: Tiles,
    items: int,
    place: Callable[[Any, Any], Place],
    own: tuple[Any, Any, Copy],
    walked: list[tuple[Any, Any, Copy]],
    compute: Callable[[Place, Any, Any], None],
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
            _when(turn >= tiles.buffers, lambda: plgpu.barrier_wait(freed.at[buffer]))
            for index in range(tiles.warpgroups):
                copy_own(place(item, index), index, buffer, filled.at[buffer])
            here = place(item, 0)
            _copy_blocks(tiles, here, done, walked)
            return done + here.steps

        lax.fori_loop(0, turns, one, jnp.int32(0))


def _when(condition: Any, do: Callable[[], None]) -> None:
    pl.when(condition)(do)


def _copy_blocks(tiles: Tiles, place: Place, done: Any, walked: list[tuple[Any, Any, Copy]]) -> None:
    """For every step, as its slots fall free, ask for what the others will read."""

    @pl.loop(0, place.steps)
    def _step(step: Any) -> None:
        slot = lax.rem(done + step, tiles.stages)
        for filled, freed, copy in walked:
            _when(done + step >= tiles.stages, lambda freed=freed: plgpu.barrier_wait(freed.at[slot]))
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
    place: Place,
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

"""What the kernels of ``hopper`` work on: items, tiles, the blocks that a tile needs, and masks.

An item of work is a tile for each warpgroup of a thread block that computes. Letters as in ``hopper``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mor_jax.kernels.attention.mask import NEVER

ROWS = 64
"""Rows of a warpgroup's tile: what one wgmma instruction takes."""


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut."""

    block_rows: int
    """Rows of a block that is walked over."""
    warpgroups: int
    """Warpgroups that compute."""
    stages: int
    """Blocks in flight."""
    persistent: bool
    """Whether a thread block per multiprocessor takes items in turn, rather than a thread block per item."""

    @property
    def buffers(self) -> int:
        """Items whose rows are in shared memory."""
        return 2 if self.persistent else 1


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
class WarpgroupPlace:
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


def place_queries(shape: Shape, tiles: Tiles, plan_ref: Any, item: Any, wg: Any) -> WarpgroupPlace:
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
            blocks = pl.cdiv(shape.keys, tiles.block_rows)
            rest = jnp.minimum(lax.div(tile * ROWS, tiles.block_rows), blocks)  # warpgroups without a tile lie beyond
            return Span(0, 0, rest, jnp.minimum(rest + 1, blocks))
        return _read(plan_ref, batch, tile, shape.queries)

    own = unit + wg
    head = kv_head * shape.groups + lax.rem(own, shape.groups)
    begin, stop = _bounds([span(unit + i) for i in range(tiles.warpgroups)])
    return WarpgroupPlace(batch, kv_head, head, lax.div(own, shape.groups), span(own), begin, stop, stop - begin)


def place_keys(shape: Shape, tiles: Tiles, plan_ref: Any, item: Any, wg: Any) -> WarpgroupPlace:
    """The place of a warpgroup. A row's items come one after the other: else their queries do not fit the cache."""
    blocks = key_items(shape, tiles) // (shape.batch * shape.kv_heads)
    pair, block = lax.div(item, blocks), lax.rem(item, blocks)
    batch, kv_head = lax.div(pair, shape.kv_heads), lax.rem(pair, shape.kv_heads)

    def span(tile: Any) -> Span:
        if plan_ref is None:
            last = pl.cdiv(shape.queries, tiles.block_rows)
            first = jnp.minimum(lax.div(tile * ROWS, tiles.block_rows), last)
            return Span(first, jnp.minimum(first + 1, last), last, last)
        return _read(plan_ref, batch, tile, shape.keys)

    tile = block * tiles.warpgroups
    begin, stop = _bounds([span(tile + i) for i in range(tiles.warpgroups)])
    steps = shape.groups * (stop - begin)
    return WarpgroupPlace(batch, kv_head, kv_head, tile + wg, span(tile + wg), begin, stop, steps)


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
    last, rest = pl.cdiv(end.max(axis=2), tiles.block_rows), end.min(axis=2) // tiles.block_rows
    first = whole = jnp.zeros_like(last)
    if len(runs) == 2:
        start = _tiled(runs[0], ROWS, NEVER)
        first, whole = start.min(axis=2) // tiles.block_rows, pl.cdiv(start.max(axis=2), tiles.block_rows)
    first, whole = jnp.minimum(first, last), jnp.minimum(whole, last)
    return jnp.stack([first, whole, jnp.maximum(rest, whole), last], axis=2)


def plan_keys(runs: tuple[jax.Array, ...], tiles: Tiles, keys: int) -> jax.Array:
    """int32 [B, tiles of keys, 4]: the span of blocks of queries of every tile.

    A block needs no mask if all of its queries see the whole tile. Those without keys do not count, as they have no
    weight anywhere (``forward_kernel``). With one run ``rest`` is ``last``: if ``end`` ascends, blocks that need a mask
    come first. If runs do not ascend, only the last such blocks in a row go without.
    """
    end_BIT = _tiled(runs[-1], tiles.block_rows, 0)
    start_BIT = _tiled(runs[0], tiles.block_rows, NEVER) if len(runs) == 2 else jnp.zeros_like(end_BIT)
    seeing_BIT = end_BIT > jnp.maximum(start_BIT, 0)

    def bound(reduce: Callable[..., jax.Array], x_BIT: jax.Array, otherwise: int) -> jax.Array:
        """[B, 1, I]: over the queries of a block that see something."""
        return reduce(jnp.where(seeing_BIT, x_BIT, otherwise), axis=2)[:, None, :]

    low_J = ROWS * jnp.arange(pl.cdiv(keys, ROWS), dtype=jnp.int32)[None, :, None]
    high_J = low_J + ROWS
    needed_BJI = (bound(jnp.max, end_BIT, 0) > low_J) & (bound(jnp.min, start_BIT, NEVER) < high_J)
    clear_BJI = (bound(jnp.min, end_BIT, NEVER) >= high_J) & (bound(jnp.max, start_BIT, 0) <= low_J)
    index = jnp.arange(end_BIT.shape[1], dtype=jnp.int32)[None, None, :]

    def past(blocks_BJI: jax.Array) -> jax.Array:
        """One past the last of these blocks."""
        return jnp.max(jnp.where(blocks_BJI, index + 1, 0), axis=2)

    last = past(needed_BJI)
    first = jnp.minimum(jnp.min(jnp.where(needed_BJI, index, index.size), axis=2), last)
    rest = last if len(runs) == 1 else jnp.maximum(past(needed_BJI & clear_BJI), first)
    whole = jnp.maximum(past(~clear_BJI & (index < rest[:, :, None])), first)
    return jnp.stack([first, whole, rest, last], axis=2)


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

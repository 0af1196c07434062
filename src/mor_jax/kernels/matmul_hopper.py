"""Matrix products (GEMMs) with an epilogue, for Hopper GPUs in Pallas (Mosaic GPU): what such kernels share.

A thread block takes tiles of [128, 256] of the product in turn. Two warpgroups compute 64 rows each, a third asks the
copy engine (TMA) for blocks of both operands, 64 deep, ahead over the ends of tiles. The engine reads rows beyond an
array's end as zeros and does not write them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mor_jax.kernels.hopper_launch import REGISTERS, launch, tiled_smem
from mor_jax.mesh.devices import multiprocessors

WARPGROUPS = 2
ROWS = 64
"""Of a warpgroup's tile."""
BLOCK_ROWS = WARPGROUPS * ROWS
COLUMNS = 256
"""Of a tile: what the accumulators in registers hold."""
DEPTH = 64
"""Of a block of operands: rows of 128 bytes, as the copy engine swizzles them; and columns written at once."""
STAGES = 4
"""Blocks of operands in shared memory; three are 10% slower, five do not fit."""
SLOTS = 2
"""Pieces of a warpgroup's results in shared memory."""
STAGGER_GROUPS = 4
"""Groups of thread blocks that start one after the other where the epilogue reads blocks."""
STAGGER_COPIES = 5
"""By how many copies of a block, each waited for, a group starts later than the one before."""


@dataclass(frozen=True)
class Walk:
    """Which tiles and blocks there are: columns fastest, so that rows are read from memory once."""

    row_tiles: int
    column_tiles: int
    depth_blocks: int
    """Blocks of the operands for a tile."""
    epilogue_blocks: int
    """Blocks that its epilogue reads. Then thread blocks start staggered: else all are in the epilogue, which the
    memory's speed limits, at once, and so at products, which leave the memory idle (6 to 8%)."""

    @property
    def steps(self) -> int:
        """Blocks copied for a tile."""
        return self.depth_blocks + self.epilogue_blocks

    @property
    def programs(self) -> int:
        """Thread blocks."""
        return min(self.row_tiles * self.column_tiles, multiprocessors())


def plan_tiles(rows: int, depth: int, columns: int, epilogue_blocks: int = 0) -> Walk:
    """Of a product [rows, columns] of operands ``depth`` deep; columns and depth in whole blocks."""
    assert depth % DEPTH == 0
    assert columns % COLUMNS == 0
    return Walk(-(-rows // BLOCK_ROWS), columns // COLUMNS, depth // DEPTH, epilogue_blocks)


@dataclass(frozen=True)
class Ring:
    """Barriers of blocks of operands in shared memory: filled, free again; and of the copies of a staggered start."""

    filled: Any
    freed: Any
    late_start: Any

    def slot(self, step: Any) -> Any:
        """Where the block of a step, counted over all tiles, lies."""
        return lax.rem(step, STAGES)

    def wait(self, step: Any) -> Any:
        """Wait until a block is there; return its slot."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.filled.at[slot])
        return slot

    def free(self, step: Any) -> None:
        """Say that this warpgroup has read a block."""
        plgpu.barrier_arrive(self.freed.at[self.slot(step)])


def run_tiles(walk: Walk, ring: Ring, copy: Callable[..., None], compute: Callable[..., None]) -> None:
    """The body of a kernel.

    Args:
        walk: tiles and blocks.
        ring: barriers of the slots.
        copy: asks for a block: (row tile, column tile, block of the tile, slot, barrier, whether the
            epilogue reads it).
        compute: a tile of a warpgroup: (row tile, column tile, blocks of the tiles before).
    """
    wg, first, count = lax.axis_index("wg"), lax.axis_index("block"), walk.programs
    turns = lax.div(walk.row_tiles * walk.column_tiles - first + count - 1, count)

    def tile(turn: Any) -> tuple[Any, Any]:
        index = first + turn * count
        return lax.div(index, walk.column_tiles), lax.rem(index, walk.column_tiles)

    @pl.when(wg < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[WARPGROUPS][0], action="increase")
        pl.loop(0, turns)(lambda turn: compute(*tile(turn), turn * walk.steps))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(REGISTERS[WARPGROUPS][1], action="decrease")
        if walk.epilogue_blocks:

            @pl.loop(0, lax.rem(first, STAGGER_GROUPS) * STAGGER_COPIES)
            def _start(_: Any) -> None:
                copy(*tile(0), 0, 0, ring.late_start, False)
                plgpu.barrier_wait(ring.late_start)

        @pl.loop(0, turns)
        def _tile(turn: Any) -> None:
            def one(block: Any, *, in_epilogue: bool) -> None:
                step = turn * walk.steps + block
                slot = ring.slot(step)
                pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(ring.freed.at[slot]))
                copy(*tile(turn), block, slot, ring.filled.at[slot], in_epilogue)

            pl.loop(0, walk.depth_blocks)(functools.partial(one, in_epilogue=False))
            if walk.epilogue_blocks:
                pl.loop(walk.depth_blocks, walk.steps)(functools.partial(one, in_epilogue=True))


def matmul_tile(walk: Walk, ring: Ring, done: Any, multiply: Callable[[Any, Any], None]) -> jax.Array:
    """A warpgroup's tile [64, 256] of the product, float32; a block is freed while the next is multiplied.

    Args:
        walk: tiles and blocks.
        ring: barriers of the slots.
        done: blocks of the tiles before.
        multiply: adds to the accumulator the product of the blocks in a slot.
    """

    def run(accumulator: Any) -> jax.Array:
        multiply(accumulator, ring.wait(done))

        @pl.loop(1, walk.depth_blocks)
        def _block(block: Any) -> None:
            multiply(accumulator, ring.wait(done + block))
            plgpu.wgmma_wait(1)
            ring.free(done + block - 1)

        plgpu.wgmma_wait(0)
        ring.free(done + walk.depth_blocks - 1)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, COLUMNS), jnp.float32))


def store(out_smem: Any, index: int, piece: jax.Array, target: Any) -> None:
    """Write a piece [64, 64] to memory; those of a tile, an even number, go through a warpgroup's slots in turn."""
    slot = out_smem.at[lax.axis_index("wg"), index % SLOTS]
    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
    slot[...] = piece.astype(slot.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, target)


def piece_columns(tile: Any, width: int, piece: int) -> Any:
    """Columns of a piece of a tile that covers ``width`` of the feed-forward's."""
    return pl.ds(tile * width + piece * DEPTH, DEPTH)


def own_rows(tile: Any = 0) -> Any:
    """This warpgroup's rows of a tile."""
    return pl.ds(tile * BLOCK_ROWS + lax.axis_index("wg") * ROWS, ROWS)


def call_matmul(
    body: Callable[..., None],
    name: str,
    walk: Walk,
    *,
    operands: tuple[Any, ...],
    out: Any,
    block: tuple[int, int],
    interpret: Any,
) -> Any:
    """Run a kernel.

    Args:
        body: sees references to operands and results, and by name `a_smem`, `b_smem` (blocks of the first and of the
            second operand in shared memory), `out_smem` (pieces of the results) and `ring`.
        name: of the compiled kernel.
        walk: over tiles.
        operands: arrays.
        out: shapes and dtypes of the results.
        block: shape of one block of the second operand in shared memory.
        interpret: parameters of Pallas' GPU interpreter; None compiles.
    """
    dtype = operands[0].dtype

    def with_ring(*refs: Any, filled: Any, freed: Any, late_start: Any, **smem: Any) -> None:
        body(*refs, ring=Ring(filled, freed, late_start), **smem)

    scratch = {
        "a_smem": tiled_smem(dtype, STAGES, BLOCK_ROWS, DEPTH),
        "b_smem": tiled_smem(dtype, STAGES, *block),
        "out_smem": tiled_smem(dtype, WARPGROUPS, SLOTS, ROWS, DEPTH),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "freed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        "late_start": plgpu.Barrier(num_arrivals=2),
    }
    options = {"programs": walk.programs, "warpgroups": WARPGROUPS, "interpret": interpret}
    return launch(with_ring, name, operands=operands, out=out, scratch=scratch, **options)

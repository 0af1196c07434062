"""Matrix products of a few rows with large weights, one GPU kernel each: norm before, activation or residual after.

Decoding 32 to 128 tokens reads every weight once for little arithmetic, so what counts is bytes in flight and the
number of launches. Weights lie as [N, K], K contiguous: a program streams whole cache lines of a few outputs. Where the
outputs alone make too few programs, the sum is split over several, and the last to arrive adds the parts in a fixed
order (the result does not depend on who that is).

Letters: B rows, K summed, N outputs, S parts of a sum, X tiles of outputs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclass(frozen=True)
class Tile:
    """How one product is cut into programs."""

    rows: int = 32
    """Rows of a program, a power of 2 from 16."""
    outputs: int = 16
    """Outputs of a program, likewise (of gate and of up each)."""
    depth: int = 128
    """Terms of the sum that a program reads at a time, likewise."""
    parts: int = 1
    """S: programs that share a sum."""
    warps: int = 4
    stages: int = 4
    """Reads in flight, over shared memory."""


_MEASURED = {
    (True, 1600, 960): Tile(32, 16, 256, 1, stages=3),  # queries, keys and values
    (True, 960, 960): Tile(32, 16, 64, 1, stages=8),  # attention's output
    (True, 2560, 960): Tile(32, 32, 64, 1, stages=5),  # gate and up
    (True, 960, 2560): Tile(32, 32, 128, 4, stages=4),  # down
    (False, 1600, 960): Tile(64, 64, 64, 1, stages=4),
    (False, 960, 960): Tile(64, 16, 128, 1, stages=4),
    (False, 2560, 960): Tile(32, 64, 64, 1, stages=4),
    (False, 960, 2560): Tile(64, 32, 128, 4, stages=3),
}
"""By (at most 32 rows, N, K): the fastest of 7 to 27 tiles per 360M shape at 32 and at 82 rows on an H100, bfloat16
(experiments/serving/results/tiles.json); up to 1.8 times faster than what ``tile_for`` makes up for other shapes."""

MAX_ROWS = 256
"""Rows beyond which arithmetic counts, and XLA's products are the better ones."""
TICKETS = 1024
"""Entries of the array by which programs that share a sum find out who is last: at least the tiles of any product."""


def tile_for(rows: int, outputs: int, depth: int, *, splits: bool, size: int = 2) -> Tile:
    """Choose a tile for H100-like GPUs: measured, or enough programs to keep the memory busy, tall to read rows seldom.

    Args:
        rows: B.
        outputs: N (of gate and of up each).
        depth: K.
        splits: whether the sum may be split.
        size: bytes of a value.
    """
    few = rows <= 32
    measured = _MEASURED.get((few, outputs, depth))
    if measured is not None and size == 2 and rows > 16 and (splits or measured.parts == 1):
        return measured
    tile_outputs = 16 if few else 32
    programs = -(-outputs // tile_outputs)
    parts = 1
    while splits and programs * parts < 96 and parts < 4 and depth >= 256 * parts:
        parts *= 2
    height = 16 if rows <= 16 else 32 if few else 64 if rows <= 64 else 128
    # float32 takes twice the shared memory
    return Tile(rows=height, outputs=tile_outputs, depth=128 if few else 64, parts=parts, stages=4 if size == 2 else 2)


def _load(ref: Any, starts: tuple[Any, Any], shape: tuple[int, int], insides: tuple[Any, Any]) -> jax.Array:
    """A tile of a matrix; ``insides`` say which of its rows and columns lie inside (None: all), others are 0."""
    tile = ref.at[pl.ds(starts[0], shape[0]), pl.ds(starts[1], shape[1])]
    masks = [
        jnp.broadcast_to(inside[:, None] if axis == 0 else inside[None, :], shape)
        for axis, inside in enumerate(insides)
        if inside is not None
    ]
    if not masks:
        return plgpu.load(tile)
    return plgpu.load(tile, mask=functools.reduce(jnp.logical_and, masks), other=0)


def _inside(start: Any, length: int, size: int, multiple: int | None = None) -> jax.Array | None:
    """Which of ``length`` indices from ``start`` are below ``size``; None if all tiles are whole."""
    return None if size % (multiple or length) == 0 else start + jnp.arange(length) < size


@dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    tile: Tile
    rows: int
    depth: int
    outputs: int
    epsilon: float | None
    """Of the norm; None is none."""
    scale_rows: bool
    """Whether every row has its own norm scales."""
    gated: bool
    residual: bool
    precision: Any
    interpret: bool

    @property
    def steps(self) -> int:
        """Reads of a program."""
        return pl.cdiv(pl.cdiv(self.depth, self.tile.depth), self.tile.parts)


def _accumulate(plan: _Plan, x_ref: Any, scale_ref: Any, weight_ref: Any, row0: Any, out0: Any) -> Any:
    """This program's part of the sums, of gate and up if there are both, and of the squares of its rows."""
    tile = plan.tile
    inside_B, inside_N = _inside(row0, tile.rows, plan.rows), _inside(out0, tile.outputs, plan.outputs)
    first = pl.program_id(1) * plan.steps * tile.depth

    def step(index: Any, carry: Any) -> Any:
        sums, squares_B = carry
        start = first + index * tile.depth
        inside_K = _inside(start, tile.depth, plan.depth, tile.depth * tile.parts)
        x_BK = _load(x_ref, (row0, start), (tile.rows, tile.depth), (inside_B, inside_K))
        if plan.epsilon is not None:
            x32_BK = x_BK.astype(jnp.float32)
            squares_B += jnp.sum(x32_BK * x32_BK, axis=1)
            scale_start, scale_rows = (row0, tile.rows) if plan.scale_rows else (0, 1)
            inside_scale = (inside_B if plan.scale_rows else None, inside_K)
            scale_BK = _load(scale_ref, (scale_start, start), (scale_rows, tile.depth), inside_scale)
            # the norm's factor is the same for a whole row: it can wait until the sum is done
            x_BK = (x32_BK * scale_BK).astype(x_BK.dtype)
        offsets = (0, plan.outputs) if plan.gated else (0,)
        weights = [
            _load(weight_ref, (out0 + offset, start), (tile.outputs, tile.depth), (inside_N, inside_K))
            for offset in offsets
        ]
        return tuple(t + _dot(x_BK, w_NK, plan) for t, w_NK in zip(sums, weights, strict=True)), squares_B

    zero = jnp.zeros((tile.rows, tile.outputs), jnp.float32)
    carry = ((zero,) * (2 if plan.gated else 1), jnp.zeros((tile.rows,), jnp.float32))
    return jax.lax.fori_loop(0, plan.steps, step, carry)


def _dot(x_BK: jax.Array, weight_NK: jax.Array, plan: _Plan) -> jax.Array:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_BK, weight_NK, contract, precision=plan.precision, preferred_element_type=jnp.float32)


def _kernel(*refs: Any, plan: _Plan) -> None:
    tile, left = plan.tile, list(refs)
    x_ref, scale_ref = left.pop(0), left.pop(0) if plan.epsilon is not None else None
    weight_ref = left.pop(0)
    residual_ref = left.pop(0) if plan.residual else None
    row0, out0 = pl.program_id(2) * tile.rows, pl.program_id(0) * tile.outputs
    sums, squares_B = _accumulate(plan, x_ref, scale_ref, weight_ref, row0, out0)
    if plan.epsilon is not None:
        inverse_B = jax.lax.rsqrt(squares_B / plan.depth + plan.epsilon)
        sums = tuple(total * inverse_B[:, None] for total in sums)
    if tile.parts == 1:
        _finish(plan, sums, residual_ref, left[0], row0, out0)
        return
    _, out_ref, tickets_ref, partial_ref = left
    height, columns = pl.num_programs(2) * tile.rows, pl.ds(out0, tile.outputs)
    part_at = lambda part: partial_ref.at[pl.ds(part * height + row0, tile.rows), columns]  # noqa: E731
    plgpu.store(part_at(pl.program_id(1)), sums[0])
    if not plan.interpret:
        plgpu.debug_barrier()  # all of this program's part lies in memory before it says so
    number = jnp.asarray(pl.program_id(2) * pl.num_programs(0) + pl.program_id(0), jnp.int32)
    arrived = plgpu.atomic_add(tickets_ref, (number,), jnp.ones((), jnp.int32))

    @pl.when(arrived == tile.parts - 1)
    def _last() -> None:
        parts = [plgpu.load(part_at(part)) for part in range(tile.parts)]
        _finish(plan, (sum(parts[1:], parts[0]),), residual_ref, out_ref, row0, out0)
        tickets_ref[number] = 0  # as the next kernel expects it


def _finish(plan: _Plan, sums: Any, residual_ref: Any, out_ref: Any, row0: Any, out0: Any) -> None:
    tile = plan.tile
    block = (pl.ds(row0, tile.rows), pl.ds(out0, tile.outputs))
    total_BN = jax.nn.silu(sums[0]) * sums[1] if plan.gated else sums[0]
    inside_B, inside_N = row0 + jnp.arange(tile.rows) < plan.rows, out0 + jnp.arange(tile.outputs) < plan.outputs
    inside = jnp.broadcast_to(inside_B[:, None] & inside_N[None, :], total_BN.shape)
    if residual_ref is not None:
        total_BN += plgpu.load(residual_ref.at[block], mask=inside, other=0).astype(jnp.float32)
    plgpu.store(out_ref.at[block], total_BN.astype(out_ref.dtype), mask=inside)


@functools.partial(jax.jit, static_argnames=("epsilon", "outputs", "tile", "interpret"))
def product(
    x_BK: jax.Array,
    weight: jax.Array,
    *,
    scale: jax.Array | None = None,
    epsilon: float = 0.0,
    residual_BN: jax.Array | None = None,
    tickets_X: jax.Array | None = None,
    outputs: int | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Return norm(x) W, or x W + residual, or silu(norm(x) W_gate) * (norm(x) W_up), summed in float32.

    Args:
        x_BK: the rows.
        weight: [N, K], or gate and up [2, N, K]; in the rows' dtype.
        scale: float32 [K], or [B, K]: RMSNorm of the rows with this scale comes first.
        epsilon: of the norm.
        residual_BN: added to the product.
        tickets_X: int32 [``TICKETS``], all 0, and 0 again afterwards; updated in place. Without it no sum is split.
        outputs: leading rows of the weight to take; None is all.
        tile: how to cut; None is ``tile_for``.
        interpret: run the kernel's program on the CPU, to test it.

    Returns:
        [B, N] in the rows' dtype, and the tickets.
    """
    rows, depth = x_BK.shape
    count, gated = outputs or weight.shape[-2], weight.ndim == 3
    splits = tickets_X is not None and scale is None and not gated
    tile = tile or tile_for(rows, count, depth, splits=splits, size=x_BK.dtype.itemsize)
    precision = jax.lax.Precision.HIGHEST if x_BK.dtype == jnp.float32 else None
    norm, scale_rows = (None, False) if scale is None else (epsilon, scale.ndim == 2)
    if scale is not None:
        scale = scale if scale_rows else scale[None, :]
    plan = _Plan(tile, rows, depth, count, norm, scale_rows, gated, residual_BN is not None, precision, interpret)
    grid = (pl.cdiv(count, tile.outputs), tile.parts, pl.cdiv(rows, tile.rows))
    operands = [x_BK, *(x for x in (scale, weight.reshape(-1, depth), residual_BN) if x is not None)]
    shapes = [jax.ShapeDtypeStruct((rows, count), x_BK.dtype)]
    aliases = {}
    if tile.parts > 1:
        assert splits
        assert tickets_X is not None
        assert grid[0] * grid[2] <= TICKETS
        aliases = {len(operands): 1}
        operands.append(tickets_X)
        padded = (tile.parts * grid[2] * tile.rows, grid[0] * tile.outputs)
        shapes += [jax.ShapeDtypeStruct(tickets_X.shape, jnp.int32), jax.ShapeDtypeStruct(padded, jnp.float32)]
    out_BN, *rest = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=grid,
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="product_gated" if gated else "product_norm" if scale is not None else "product_residual",
    )(*operands)
    return out_BN, rest[0] if rest else tickets_X

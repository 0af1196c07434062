"""Final norm, output head and the choice of a token in one GPU kernel; logits never reach memory.

A program computes the logits of some rows for one tile of the vocabulary and keeps, per row, what choosing a token
needs of them. Only cuts of the vocabulary (top-k, top-p) need all logits at once; they take the plain path.
Letters: E rows, D width, V vocabulary, X tiles of it, N entries of a tile.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mor_jax.infer.sampling import SamplingRows, gumbel, noise_keys


@dataclass(frozen=True)
class HeadTile:
    """How the head is cut into programs."""

    entries: int = 128
    """Vocabulary entries of a program, a power of 2 from 16."""
    depth: int = 64
    """Terms of the sum that it reads at a time, likewise."""
    warps: int = 4
    stages: int = 4
    """Reads in flight, over shared memory."""


def head_tile_for(rows: int, size: int = 2) -> HeadTile:
    """Choose a tile: on an H100 it stood in every measured run, but no other has been tried.

    Args:
        rows: E.
        size: bytes of a value.
    """
    # float32 takes twice the shared memory
    return HeadTile(warps=4 if rows <= 32 else 8, stages=2 if size == 4 else 4 if rows <= 32 else 3)


@dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    tile: HeadTile
    rows: int
    height: int
    """Rows of a program."""
    depth: int
    vocabulary: int
    known: int
    """Entries that may be chosen."""
    epsilon: float
    precision: Any


def _logits(plan: _Plan, x_ref: Any, scale_ref: Any, head_ref: Any, row0: Any, first: Any) -> jax.Array:
    """float32 [E, N] of this program's rows and tile."""
    height, width, depth = plan.height, plan.tile.entries, plan.tile.depth
    inside_E = jnp.broadcast_to((row0 + jnp.arange(height) < plan.rows)[:, None], (height, depth))
    inside_N = jnp.broadcast_to((first + jnp.arange(width) < plan.vocabulary)[:, None], (width, depth))

    def step(index: Any, carry: Any) -> Any:
        total_EN, squares_E = carry
        columns = pl.ds(index * depth, depth)
        inside_D = (index * depth + jnp.arange(depth) < plan.depth)[None, :]
        rows, entries = x_ref.at[pl.ds(row0, height), columns], head_ref.at[pl.ds(first, width), columns]
        x_ED = plgpu.load(rows, mask=inside_E & inside_D, other=0)
        head_ND = plgpu.load(entries, mask=inside_N & inside_D, other=0)
        scale_1D = plgpu.load(scale_ref.at[pl.ds(0, 1), columns], mask=inside_D, other=0)
        x32_ED = x_ED.astype(jnp.float32)
        normed_ED = (x32_ED * scale_1D).astype(x_ED.dtype)
        contract = (((1,), (1,)), ((), ()))
        total_EN += jax.lax.dot_general(
            normed_ED, head_ND, contract, precision=plan.precision, preferred_element_type=jnp.float32
        )
        return total_EN, squares_E + jnp.sum(x32_ED * x32_ED, axis=1)

    carry = jnp.zeros((height, width), jnp.float32), jnp.zeros((height,), jnp.float32)
    total_EN, squares_E = jax.lax.fori_loop(0, pl.cdiv(plan.depth, depth), step, carry)
    return total_EN * jax.lax.rsqrt(squares_E / plan.depth + plan.epsilon)[:, None]


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    head_ref: Any,
    temperature_ref: Any,
    keys_ref: Any,
    found_ref: Any,
    token_ref: Any,
    *,
    plan: _Plan,
) -> None:
    tile, row0, width = pl.program_id(0), pl.program_id(1) * plan.height, plan.tile.entries
    logits_EN = _logits(plan, x_ref, scale_ref, head_ref, row0, tile * width)
    entry_1N = (tile * width + jnp.arange(width))[None, :]
    logits_EN = jnp.where(entry_1N < plan.vocabulary, logits_EN, -jnp.inf)
    inside_E = row0 + jnp.arange(plan.height) < plan.rows
    row = lambda ref, at=row0: plgpu.load(ref.at[pl.ds(at, plan.height)], mask=inside_E, other=0)  # noqa: E731
    temperature_E, keys = row(temperature_ref), [row(keys_ref, at=row0 + i * plan.rows) for i in range(2)]
    noise_EN = gumbel(keys[0][:, None], keys[1][:, None], entry_1N.astype(jnp.uint32))
    draws_E1 = (temperature_E > 0)[:, None]
    noised_EN = jnp.where(draws_E1, logits_EN / jnp.maximum(temperature_E, 1e-4)[:, None] + noise_EN, logits_EN)
    noised_EN = jnp.where(entry_1N < plan.known, noised_EN, -jnp.inf)
    best_E, nth_E = jnp.max(noised_EN, axis=1), jnp.argmax(noised_EN, axis=1)
    chosen_EN = jnp.arange(width)[None, :] == nth_E[:, None]
    logit_E = jnp.max(jnp.where(chosen_EN, logits_EN, -jnp.inf), axis=1)
    top_E = jnp.max(logits_EN, axis=1)
    total_E = jnp.sum(jnp.exp(logits_EN - top_E[:, None]), axis=1)
    for field, value_E in enumerate((best_E, logit_E, top_E, total_E)):
        plgpu.store(found_ref.at[pl.ds(field * plan.rows + row0, plan.height), tile], value_E, mask=inside_E)
    plgpu.store(token_ref.at[pl.ds(row0, plan.height), tile], tile * width + nth_E.astype(jnp.int32), mask=inside_E)


def _combine_kernel(found_ref: Any, tokens_ref: Any, token_ref: Any, log_probability_ref: Any, *, size: Any) -> None:
    """One row: the best of the tiles' tokens, and the normaliser of all."""
    rows, tiles = size
    nth_X = jnp.arange(1 << (tiles - 1).bit_length())
    row, inside_X = pl.program_id(0), nth_X < tiles
    field = lambda index: plgpu.load(  # noqa: E731
        found_ref.at[index * rows + row, nth_X], mask=inside_X, other=-jnp.inf
    )
    best_X, logit_X, top_X = (field(index) for index in range(3))
    total_X = jnp.where(inside_X, field(3), 0.0)
    token_X = plgpu.load(tokens_ref.at[row, nth_X], mask=inside_X, other=0)
    chosen_X = nth_X == jnp.argmax(best_X, axis=0)
    top = jnp.max(top_X)
    token_ref[row] = jnp.sum(jnp.where(chosen_X, token_X, 0))
    normaliser = top + jnp.log(jnp.sum(total_X * jnp.exp(top_X - top)))
    log_probability_ref[row] = jnp.max(jnp.where(chosen_X, logit_X, -jnp.inf)) - normaliser


def sample_head(
    x_ED: jax.Array,
    scale_D: jax.Array,
    head_VD: jax.Array,
    rows: SamplingRows,
    position_E: jax.Array,
    *,
    epsilon: float,
    known_tokens: int | None = None,
    tile: HeadTile | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Choose a token per row as ``sampling.sample`` does of the logits, without cuts of the vocabulary.

    Args:
        x_ED: states after the last layer.
        scale_D: float32 scale of the final norm.
        head_VD: output head, in the states' dtype.
        rows: how; top-k and top-p are ignored.
        position_E: int32 position of the token that the logits follow.
        epsilon: of the norm.
        known_tokens: see ``sampling.sample``.
        tile: how to cut; None is ``head_tile_for``.
        interpret: run the kernel's program on the CPU, to test it.

    Returns:
        int32 tokens, and their float32 log-probability under the model.
    """
    count, depth = x_ED.shape
    vocabulary = head_VD.shape[0]
    height = next((h for h in (16, 32, 64) if count <= h), 128)
    precision = jax.lax.Precision.HIGHEST if x_ED.dtype == jnp.float32 else None
    tile = tile or head_tile_for(count, x_ED.dtype.itemsize)
    plan = _Plan(tile, count, height, depth, vocabulary, known_tokens or vocabulary, epsilon, precision)
    tiles = pl.cdiv(vocabulary, tile.entries)
    params = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    found_YX, tokens_EX = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(tiles, pl.cdiv(count, height)),
        out_shape=[
            jax.ShapeDtypeStruct((4 * count, tiles), jnp.float32),
            jax.ShapeDtypeStruct((count, tiles), jnp.int32),
        ],
        compiler_params=None if interpret else params,
        interpret=interpret,
        name="sample_head",
    )(x_ED, scale_D[None, :], head_VD, rows.temperature_E, noise_keys(rows.seed_E, position_E).reshape(-1))
    return pl.pallas_call(
        functools.partial(_combine_kernel, size=(count, tiles)),
        grid=(count,),
        out_shape=[jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.float32)],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sample_combine",
    )(found_YX, tokens_EX)

"""The softmax of a chunk of logits and its gradient in one kernel, for NVIDIA GPUs in Pallas (Triton).

XLA reads the logits three times from memory: for the largest of a row, for its sum of exponentials, for the gradient.
Here a program reads its row once for both (online), and once more, from the cache, to write the gradient over it.
Letters: M tokens of a chunk, V vocabulary, X entries of a row that are in registers at once.

References: Milakov and Gimelshein (2018), "Online normalizer calculation for softmax".
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from mor_jax.kernels.norm import call_kernel

_LOG2_E = math.log2(math.e)
_LOWEST = -3e38
"""Finite, so that no difference of two logits is infinity minus infinity."""
_OFFSETS = 2**31
"""Triton counts entries of an array in 32 bits, with a sign."""


@dataclass(frozen=True)
class RowTile:
    """Entries read at once and launch parameters; the more rows a card works on, the fewer stay in its cache."""

    columns: int = 8192
    """X, a power of two."""
    warps: int = 16


TILE = RowTile()
"""What the loss takes."""


def can_address(tokens: int, vocabulary: int) -> bool:
    """Whether the kernel can address a chunk of this size."""
    return tokens * vocabulary < _OFFSETS


def softmax_cross_entropy(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    dtype: DTypeLike,
    z_coefficient: float,
    tile: RowTile | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of every token and its gradient in the logits; arithmetic is float32.

    Args:
        logits_MV: of whole rows, float [M, V]; overwritten by the gradient if they are of its dtype.
        targets_M: int [M], in 0..V-1.
        weights_M: float [M], what multiplies the gradient.
        dtype: of the gradient.
        z_coefficient: weight of the squared log-sum-exp in the gradient.
        tile: other launch parameters than ``TILE``.

    Returns:
        (gradient [M, V], negative log-likelihood [M] without weight or z-loss, log-sum-exp [M]); the last two float32.
    """
    tile = TILE if tile is None else tile
    tokens, vocabulary = logits_MV.shape
    columns = min(tile.columns, pl.next_power_of_2(vocabulary))
    row = pl.BlockSpec((None, pl.cdiv(vocabulary, columns) * columns), lambda i: (i, 0))
    one = pl.BlockSpec((None,), lambda i: (i,))
    per_token = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    return call_kernel(
        functools.partial(_kernel, size=vocabulary, columns=columns, z_coefficient=z_coefficient),
        tile.warps,
        "mor_cross_entropy",
        grid=(tokens,),
        in_specs=[row, one, one],
        out_specs=[row, one, one],
        out_shape=[jax.ShapeDtypeStruct(logits_MV.shape, dtype), per_token, per_token],
        input_output_aliases={0: 0} if logits_MV.dtype == jnp.dtype(dtype) else {},
    )(logits_MV, targets_M.astype(jnp.int32), weights_M.astype(jnp.float32))


def _kernel(
    logits_ref: Any,
    target_ref: Any,
    weight_ref: Any,
    grad_ref: Any,
    nll_ref: Any,
    lse_ref: Any,
    *,
    size: int,
    columns: int,
    z_coefficient: float,
) -> None:
    """One row. Where the gradient lies over the logits, the reductions of the first loop are the barrier between."""
    steps = pl.cdiv(size, columns)
    target = target_ref[...]
    picked = plt.load(logits_ref.at[jnp.clip(target, 0, size - 1)]).astype(jnp.float32)

    def place(index: Any) -> tuple[Any, jax.Array, jax.Array | None]:
        """Block ``index``: its slice, its columns, and which of these exist (None: all, in every block)."""
        column_X = index * columns + jax.lax.iota(jnp.int32, columns)
        return pl.ds(index * columns, columns), column_X, None if size % columns == 0 else column_X < size

    def load(block: Any, inside_X: jax.Array | None) -> jax.Array:
        other = None if inside_X is None else -jnp.inf
        return plt.load(logits_ref.at[block], mask=inside_X, other=other).astype(jnp.float32)

    def accumulate(index: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        largest, sums_X = carry
        block, _, inside_X = place(index)
        x_X = load(block, inside_X)
        new = jnp.maximum(largest, jnp.max(x_X))
        return new, sums_X * jnp.exp2((largest - new) * _LOG2_E) + jnp.exp2((x_X - new) * _LOG2_E)

    start = (jnp.float32(_LOWEST), jnp.zeros((columns,), jnp.float32))
    largest, sums_X = jax.lax.fori_loop(0, steps, accumulate, start)
    lse = largest + jnp.log(jnp.sum(sums_X))
    weight = weight_ref[...]
    scale = weight * (1.0 + 2.0 * z_coefficient * lse)

    def write(index: Any, carry: None) -> None:
        block, column_X, inside_X = place(steps - 1 - index)  # what was read last is surest to be in the cache
        x_X = load(block, inside_X)
        grad_X = jnp.exp2((x_X - lse) * _LOG2_E) * scale - jnp.where(column_X == target, weight, 0.0)
        plt.store(grad_ref.at[block], grad_X.astype(grad_ref.dtype), mask=inside_X)

    jax.lax.fori_loop(0, steps, write, None)
    nll_ref[...] = lse - picked
    lse_ref[...] = lse

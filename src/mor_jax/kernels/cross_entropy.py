"""The cross-entropy of a chunk of logits and its gradient: plain, and in one kernel for NVIDIA GPUs in Pallas (Triton).

XLA reads the logits three times from memory: for the largest of a row, for its sum of exponentials, for the gradient.
Here a program reads its row once for both (online), and once more, from the cache, to write the gradient over it.
Letters: B rows, C positions and M tokens of a chunk, V vocabulary, X entries of a row that are in registers at once.

References: Milakov and Gimelshein (2018), "Online normalizer calculation for softmax".
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from mor_jax.kernels.choice import log_kernel
from mor_jax.kernels.pallas_triton import MISSING, call_kernel, is_available, plt
from mor_jax.mesh.axes import axis_size

_LOG2_E = math.log2(math.e)
_LOWEST = -3e38
"""Finite, so that no difference of two logits is infinity minus infinity."""
_OFFSETS = 2**31
"""Triton counts entries of an array in 32 bits, with a sign."""


def _is_split() -> bool:
    return axis_size("tensor") > 1


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose logits this device computes.

    Over `tensor` every device has one: a chunk exchanges three float32 numbers per token (largest logit, sum of
    exponentials, target's logit), never logits.

    References: Shoeybi et al., Megatron-LM (2019), section 3.
    """

    size: int
    """V: entries of this part."""

    @property
    def is_whole(self) -> bool:
        """Whether there is no other part."""
        return not _is_split()

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the parts."""
        return jax.lax.psum(x, "tensor") if _is_split() else x

    def local(self, targets_BC: jax.Array) -> jax.Array:
        """Token ids counted from the part's first entry; outside 0..size-1 for other parts' tokens."""
        return targets_BC - jax.lax.axis_index("tensor") * self.size if _is_split() else targets_BC

    def logsumexp(self, logits_BCV: jax.Array) -> jax.Array:
        """Log-sum-exp over all parts, [B, C]."""
        if not _is_split():
            return jax.nn.logsumexp(logits_BCV, axis=-1)
        largest_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), "tensor")
        return largest_BC + jnp.log(self.sum(jnp.sum(jnp.exp(logits_BCV - largest_BC[..., None]), axis=-1)))

    def pick(self, logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        """Logit of each target, whichever part holds it, [B, C]."""
        local_BC = self.local(targets_BC)
        picked_BC = jnp.take_along_axis(logits_BCV, jnp.clip(local_BC, 0, self.size - 1)[..., None], axis=-1)[..., 0]
        if not _is_split():
            return picked_BC
        return self.sum(jnp.where((local_BC >= 0) & (local_BC < self.size), picked_BC, 0.0))

    def argmax(self, logits_BCV: jax.Array) -> jax.Array:
        """Token of the largest logit, the first of several, int32 [B, C]."""
        token_BC = jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)
        if not _is_split():
            return token_BC
        largest_BC = jnp.max(logits_BCV, axis=-1)
        is_best_BC = largest_BC == jax.lax.pmax(largest_BC, "tensor")
        token_BC += jax.lax.axis_index("tensor") * self.size
        return jax.lax.pmin(jnp.where(is_best_BC, token_BC, jnp.iinfo(jnp.int32).max), "tensor")


def chunk_nll(logits_BCV: jax.Array, targets_BC: jax.Array, vocabulary: VocabularyShard) -> tuple[jax.Array, jax.Array]:
    """Return (negative log-likelihood, log-sum-exp), float32 [B, C] each."""
    logits_BCV = logits_BCV.astype(jnp.float32)
    lse_BC = vocabulary.logsumexp(logits_BCV)
    return lse_BC - vocabulary.pick(logits_BCV, targets_BC), lse_BC


def chunk_gradient(
    logits_BCV: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
    vocabulary: VocabularyShard,
    dtype: DTypeLike,
    z_coefficient: float,
    *,
    fused: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of every token of a chunk and its gradient in the logits.

    Args:
        logits_BCV: of this device's part of the vocabulary.
        targets_BC: int32.
        weights_BC: float32, what multiplies the gradient.
        vocabulary: the part.
        dtype: of the gradient.
        z_coefficient: weight of the squared log-sum-exp in the gradient.
        fused: whether to use the kernel, where it exists, the vocabulary is whole and the chunk can be addressed.

    Returns:
        (weighted gradient [B, C, V]; negative log-likelihood, without weight or z-loss; log-sum-exp, float32 [B, C]).
    """
    tokens = (logits_BCV, targets_BC, weights_BC)
    if not (fused and vocabulary.is_whole and can_address(targets_BC.size, vocabulary.size)):
        return plain_gradient(*tokens, vocabulary, dtype, z_coefficient)
    if not is_available():
        log_kernel("softmax of the loss", f"XLA ({MISSING})")
        return plain_gradient(*tokens, vocabulary, dtype, z_coefficient)
    log_kernel("softmax of the loss", "Triton")
    rows = (logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1), weights_BC.reshape(-1))
    grad_MV, nll_M, lse_M = softmax_cross_entropy(*rows, dtype, z_coefficient)
    return grad_MV.reshape(logits_BCV.shape), nll_M.reshape(targets_BC.shape), lse_M.reshape(targets_BC.shape)


def plain_gradient(
    logits_BCV: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
    vocabulary: VocabularyShard,
    dtype: DTypeLike,
    z_coefficient: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``chunk_gradient`` as XLA computes it, also for a part of the vocabulary."""
    nll_BC, lse_BC = chunk_nll(logits_BCV, targets_BC, vocabulary)
    probability_BCV = jnp.exp(logits_BCV.astype(jnp.float32) - lse_BC[..., None])
    scale_BC = 1.0 + 2.0 * z_coefficient * lse_BC
    entries_V = jnp.arange(vocabulary.size, dtype=targets_BC.dtype)
    is_target_BCV = vocabulary.local(targets_BC)[..., None] == entries_V[None, None, :]
    grad_BCV = probability_BCV * scale_BC[..., None] - is_target_BCV
    return (grad_BCV * weights_BC[..., None]).astype(dtype), nll_BC, lse_BC


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
        "mor_cross_entropy",
        warps=tile.warps,
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

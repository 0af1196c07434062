"""Keys or values in int8, with a scale for every entry and head: about half the bytes of bfloat16.

An entry is quantised when it is written and never again, by its own largest number alone: what it becomes depends on no
other token, so on nothing that is batched with it.

Letters: B rows, M pages per group, P pages of the pool, Z entries per page, K H heads, X = Z * K * H, Y = Z * K.
"""

import jax
import jax.numpy as jnp
from flax import struct

_MOST = 127


@struct.dataclass
class Int8Pages:
    """A pool of pages of one layer's keys or values."""

    numbers_PX: jax.Array
    """int8."""
    scales_PY: jax.Array
    """bfloat16: what the numbers of an entry's head are multiples of. Rounded before the numbers are made, it costs no
    precision: none of these exceeds 127.25."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers, [P, X]."""
        return self.numbers_PX.shape


Pages = jax.Array | Int8Pages
"""A pool of pages [P, X] of one layer's keys or values, in the compute dtype or int8."""
KeyValuePages = tuple[Pages, Pages]
"""Keys and values of one layer."""


def quantize(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round entries to multiples of a 127th of the largest number of each head.

    Args:
        x_BTKH: keys or values. Where a head is not finite its scale is not either, so that it stays seen.

    Returns:
        int8 [B, T, K, H], and the bfloat16 scales [B, T, K].
    """
    x_BTKH = x_BTKH.astype(jnp.float32)
    largest_BTK = jnp.max(jnp.abs(x_BTKH), axis=-1)
    # to bfloat16; XLA may leave out a conversion there and back
    scale_BTK = jax.lax.reduce_precision(largest_BTK / _MOST, exponent_bits=8, mantissa_bits=7)
    multiple_BTKH = jnp.where(scale_BTK[..., None] > 0, x_BTKH / scale_BTK[..., None], 0.0)
    return jnp.round(multiple_BTKH).astype(jnp.int8), scale_BTK.astype(jnp.bfloat16)


@jax.named_scope("cache_pages")
def gather_pages(
    pages: Pages, table_BM: jax.Array, page_size: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Copy the pages of every row one after the other.

    Args:
        pages: the pool.
        table_BM: int32 pages of each row.
        page_size: Z.
        head_dim: H.
        dtype: to return from int8; other pools keep theirs.

    Returns:
        [B, M * Z, K, H].
    """
    rows, length = table_BM.shape[0], table_BM.shape[1] * page_size
    if not isinstance(pages, Int8Pages):
        return pages[table_BM].reshape(rows, length, -1, head_dim)
    numbers_BXKH = pages.numbers_PX[table_BM].reshape(rows, length, -1, head_dim)
    scales_BXK = pages.scales_PY[table_BM].reshape(rows, length, -1)
    return (numbers_BXKH.astype(jnp.float32) * scales_BXK[..., None].astype(jnp.float32)).astype(dtype)

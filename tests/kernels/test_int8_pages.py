"""Keys and values in int8: to half a step of each entry's and head's own scale, wherever pages are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.infer.cache import append
from mor_jax.kernels.int8_pages import Int8Pages, gather_pages, quantize


def _plain(x_TKH):
    """What int8 makes of numbers, entry by entry and head by head."""
    out = np.zeros(x_TKH.shape)
    for nth in np.ndindex(x_TKH.shape[:2]):
        scale = float(np.float32(np.abs(x_TKH[nth]).max() / 127).astype(jnp.bfloat16))
        if scale:
            out[nth] = np.round(x_TKH[nth] / scale) * scale
    return out


def _draw(*shape):
    """Heads of very different sizes, one of them zero."""
    rng = np.random.default_rng(0)
    x_BTKH = (rng.normal(size=shape) * 10.0 ** rng.integers(-20, 20, (*shape[:3], 1))).astype(np.float32)
    x_BTKH[0, 0, 0] = 0
    return x_BTKH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_is_off_by_half_a_step_of_its_own_head_at_most(dtype):
    x_BTKH = jnp.asarray(_draw(40, 50, 3, 8), dtype)
    numbers_BTKH, scales_BTK = jax.jit(quantize)(x_BTKH)
    assert (numbers_BTKH.dtype, scales_BTK.dtype) == (jnp.int8, jnp.bfloat16)
    x_BTKH, scales_BTK1 = (np.asarray(x, np.float64) for x in (x_BTKH, scales_BTK[..., None]))
    error_BTKH = np.abs(numbers_BTKH * scales_BTK1 - x_BTKH)
    assert (error_BTKH <= scales_BTK1 * 0.50001).all()
    assert np.abs(numbers_BTKH).max() == 127  # what a cast would wrap around is not reached
    # a scale is a 127th of the largest number, rounded to bfloat16
    np.testing.assert_allclose(scales_BTK1[..., 0] * 127, np.abs(x_BTKH).max(axis=-1), rtol=2**-8)


def test_what_is_not_finite_stays_so():
    x_BTKH = jnp.ones((1, 3, 1, 4)).at[0, 0, 0, 1].set(jnp.nan).at[0, 1, 0, 2].set(jnp.inf)
    numbers_BTKH, scales_BTK = quantize(x_BTKH)
    back_TH = (numbers_BTKH * scales_BTK[..., None])[0, :, 0]
    assert not jnp.isfinite(back_TH[:2]).all(axis=1).any()
    assert jnp.isfinite(back_TH[2]).all()


def test_entries_are_written_and_read_as_in_other_pools():
    """Two rows of groups in part full, pages of 4 entries of 3 heads; the third row writes nothing."""
    fresh = _draw(3, 6, 3, 8)
    table_BM, start_B, count_B = (
        jnp.array([[5, 2, 0], [1, 4, 3], [6, 6, 6]]),
        jnp.array([3, 4, 0]),
        jnp.array([6, 5, 0]),
    )
    empty = Int8Pages(jnp.full((7, 96), 99, jnp.int8), jnp.ones((7, 12), jnp.bfloat16))
    cached = append((empty, empty), (jnp.asarray(fresh), jnp.asarray(-fresh)), table_BM, start_B, count_B)
    for sign, pages in zip((1, -1), cached, strict=True):
        entries_BXKH = np.asarray(gather_pages(pages, table_BM, 4, 8, jnp.float32), np.float64)
        want_BXKH = np.full((3, 12, 3, 8), 99.0)
        want_BXKH[0, 3:9], want_BXKH[1, 4:9] = sign * _plain(fresh[0]), sign * _plain(fresh[1, :5])
        np.testing.assert_allclose(entries_BXKH, want_BXKH, rtol=1e-6)

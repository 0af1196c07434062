"""The GPU kernel's program, interpreted on the CPU, against the plain path; on a GPU the compiled kernel too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.infer.paged_attention import PagedStore
from mor_jax.kernels.decode_attention import decode_attention
from mor_jax.kernels.rotary import rotary_tables

# entries held, appended; the third row is full and only reads, the fourth begins a page, the last does nothing
PAGE_SIZE = 16
START, COUNT, VISIBLE = [0, 37, 128, 32, 9], [1, 1, 0, 1, 0], [1, 38, 128, 33, 0]


def _inputs(dtype, heads=6, kv_heads=2, width=16, pages=8, size=PAGE_SIZE):
    rng, rows = np.random.default_rng(0), len(START)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    table_BM = jnp.asarray(rng.permutation(rows * pages).reshape(rows, pages), jnp.int32)
    sizes = (jnp.asarray(x, jnp.int32) for x in (START, COUNT, VISIBLE))
    pool = (rows * pages, size * kv_heads * width)
    rotary = rotary_tables(jnp.asarray(START)[:, None], width, 100.0)
    projected = draw(rows, heads + 2 * kv_heads, width)
    # the row that only reads must not attend to its own key, however well that fits
    keys = slice(heads, heads + kv_heads)
    projected = projected.at[2, keys].set(100 * projected[2, : heads : heads // kv_heads])
    return projected, rotary, (draw(*pool), draw(*pool)), table_BM, *sizes


def _compare(dtype, tolerance, **arguments):
    projected, rotary, cached, table_BM, start_B, count_B, visible_B = _inputs(dtype)
    sizes = (table_BM, start_B, count_B)
    store = PagedStore(*sizes, visible_B[:, None], PAGE_SIZE)
    with jax.default_matmul_precision("highest"):
        expected, expected_cache = store.attend(projected[:, None], cached, rotary)
    angles = (rotary[0][:, 0, 0], rotary[1][:, 0, 0])
    # rows' groups stand anywhere in the table of all
    group_B = jnp.array([3, 0, 4, 6, 1])
    table_YM = jnp.full((7, table_BM.shape[1]), -1).at[group_B].set(table_BM)
    out, cache = decode_attention(
        projected, angles, cached, table_YM, group_B, *sizes[1:], visible_B, page_size=PAGE_SIZE, **arguments
    )
    np.testing.assert_allclose(
        out[:-1].astype(jnp.float32), expected[:-1, 0].astype(jnp.float32), atol=tolerance, rtol=0
    )
    assert not np.any(out[-1])
    wanted: Any = expected_cache
    for new, reference in zip(cache, wanted, strict=True):
        np.testing.assert_allclose(new.astype(jnp.float32), reference.astype(jnp.float32), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_kernel_appends_and_attends_like_the_plain_path(dtype, tolerance):
    _compare(dtype, tolerance, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_the_compiled_kernel_does_too(dtype, tolerance):
    _compare(dtype, tolerance)

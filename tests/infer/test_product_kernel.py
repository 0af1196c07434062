"""Kernels of products, head and sampling, interpreted on the CPU, against plain ones; on a GPU compiled ones too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.infer.head_kernel import sample_head
from mor_jax.infer.product_kernel import TICKETS, Tile, product, tile_for
from mor_jax.infer.sampling import SamplingRows, gumbel, sample
from mor_jax.kernels.norm import rms_norm

EPSILON = 1e-5
# one size is a multiple of the tiles, the other of nothing
SIZES = [(32, 128, 64), (21, 88, 40)]
GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
TYPES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 3e-2)])


def _normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5, dtype)


def _norm(x_BK, scale):
    return (
        x_BK if scale is None else rms_norm(x_BK[:, None], scale if scale.ndim == 1 else scale[:, None], EPSILON)[:, 0]
    )


def _plain(x_BK, weight, scale=None, residual_BN=None):
    x_BK = _norm(x_BK, scale).astype(jnp.float32)
    out = jnp.einsum("BK,...NK->...BN", x_BK, weight.astype(jnp.float32), precision="highest")
    out_BN = out if weight.ndim == 2 else jax.nn.silu(out[0]) * out[1]
    return out_BN if residual_BN is None else out_BN + residual_BN.astype(jnp.float32)


def _same(got, want, tolerance):
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance, rtol=tolerance)


def _check_norms(rows, depth, outputs, dtype, tolerance, interpret):
    x_BK = 30 * _normal(0, (rows, depth), dtype)
    weight_2NK, scale_K = _normal(1, (2, outputs, depth), dtype), 1 + _normal(2, (depth,))
    for weight, scale in ((weight_2NK[0], scale_K), (weight_2NK, scale_K), (weight_2NK[0], 1 + _normal(3, x_BK.shape))):
        out_BN, _ = product(x_BK, weight, scale=scale, epsilon=EPSILON, interpret=interpret)
        assert out_BN.dtype == x_BK.dtype
        _same(out_BN, _plain(x_BK, weight, scale), tolerance)


def _check_splits(rows, depth, outputs, dtype, tolerance, interpret, tile=None):
    x_BK, weight_NK = _normal(0, (rows, depth), dtype), _normal(1, (outputs, depth), dtype)
    residual_BN, tickets_X = _normal(2, (rows, outputs), dtype), jnp.zeros(TICKETS, jnp.int32)
    run = functools.partial(product, x_BK, weight_NK, residual_BN=residual_BN, tile=tile, interpret=interpret)
    first_BN, tickets_X = run(tickets_X=tickets_X)
    _same(first_BN, _plain(x_BK, weight_NK, residual_BN=residual_BN), tolerance)
    assert not np.any(tickets_X)
    again_BN, tickets_X = run(tickets_X=tickets_X)
    np.testing.assert_array_equal(again_BN, first_BN)  # whoever came last
    assert not np.any(tickets_X)


def _check_head(rows, depth, vocabulary, dtype, interpret):
    x_ED, head_VD, scale_D = (
        _normal(0, (rows, depth), dtype),
        _normal(1, (vocabulary, depth), dtype),
        1 + _normal(2, (depth,)),
    )
    nth_E = np.arange(rows)
    sampling = SamplingRows(
        jnp.asarray(nth_E % 3, jnp.float32), jnp.zeros(rows, jnp.int32), jnp.ones(rows), jnp.asarray(nth_E, jnp.uint32)
    )
    logits_EV = _plain(x_ED, head_VD, scale_D)
    tokens_E, log_probability_E = sample(logits_EV, sampling, jnp.asarray(nth_E))
    got = sample_head(x_ED, scale_D, head_VD, sampling, jnp.asarray(nth_E), epsilon=EPSILON, interpret=interpret)
    same_E = np.asarray(got[0] == tokens_E)
    if dtype == "float32":
        assert same_E.all()
        np.testing.assert_allclose(got[1], log_probability_E, atol=2e-5)
    else:  # close calls may fall either way
        assert same_E.mean() > 0.8
        np.testing.assert_allclose(np.asarray(got[1])[same_E], np.asarray(log_probability_E)[same_E], atol=5e-2)


@pytest.mark.parametrize(("rows", "depth", "outputs"), SIZES)
def test_products_after_a_norm(rows, depth, outputs):
    _check_norms(rows, depth, outputs, "float32", 2e-5, True)


@pytest.mark.parametrize(("rows", "depth", "outputs"), SIZES)
def test_split_sums_with_a_residual(rows, depth, outputs):
    _check_splits(rows, depth, outputs, "float32", 2e-5, True, Tile(rows=16, outputs=16, depth=16, parts=4))


def test_leading_outputs_alone():
    x_BK, weight_NK = _normal(0, (5, 32)), _normal(1, (48, 32))
    out_BN, _ = product(x_BK, weight_NK, outputs=16, interpret=True)
    _same(out_BN, _plain(x_BK, weight_NK)[:, :16], 1e-5)


@pytest.mark.parametrize("rows", [1, 16, 32, 82, 128, 200])
@pytest.mark.parametrize("outputs", [960, 1600, 2560, 8192])
def test_tickets_suffice_for_the_tiles_that_are_chosen(rows, outputs):
    tile = tile_for(rows, outputs, 960, splits=True)
    assert -(-rows // tile.rows) * -(-outputs // tile.outputs) <= TICKETS
    assert tile_for(rows, outputs, 960, splits=False).parts == 1


@pytest.mark.parametrize(("rows", "depth", "vocabulary"), [(32, 128, 256), (21, 88, 300)])
def test_head_and_sampling(rows, depth, vocabulary):
    _check_head(rows, depth, vocabulary, "float32", True)


def test_noise_is_gumbel():
    noise = np.asarray(gumbel(jnp.uint32(5), jnp.uint32(77), jnp.arange(200_000, dtype=jnp.uint32)))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    other = np.asarray(gumbel(jnp.uint32(6), jnp.uint32(77), jnp.arange(200_000, dtype=jnp.uint32)))
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.01


@pytest.mark.gpu
@GPU
@TYPES
@pytest.mark.parametrize("rows", [7, 32, 60, 82, 128])
def test_compiled_products(rows, dtype, tolerance):
    _check_norms(rows, 960, 1600, dtype, tolerance, False)
    _check_splits(rows, 2560, 960, dtype, tolerance, False)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [7, 32, 82])
def test_compiled_head_and_sampling(rows, dtype):
    _check_head(rows, 960, 49152, dtype, False)

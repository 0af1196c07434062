"""Fused norms against the plain ones, values and gradients: in Pallas' interpreter, on a GPU compiled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.kernels.norm import add_norm, residual_norm, rms_norm, skip_norm, square_sums

EPSILON = 1e-5


def _same(plain: Callable, fused: Callable, arguments: tuple[jax.Array, ...], tolerance: float = 2e-5) -> None:
    results = []
    for function in (plain, fused):
        out, pull = jax.vjp(jax.jit(function), *arguments)
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(9), x.shape), out)
        results.append(jax.tree.leaves((out, pull(grads))))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance)


def test_norms_add_both_gradients_of_the_residual_stream():
    keys = jax.random.split(jax.random.key(0), 3)
    x, delta = (jax.random.normal(key, (2, 37, 24)) for key in keys[:2])  # neither size is a power of two
    scale = 1 + 0.1 * jax.random.normal(keys[2], (24,))
    _same(_plain_norms, lambda x, delta, scale: add_norm(x, delta, scale, EPSILON), (x, delta, scale))
    _same(lambda x, s: (x, rms_norm(x, s, EPSILON)), lambda x, scale: skip_norm(x, scale, EPSILON), (x, scale))


def test_known_sums_of_squares_change_neither_value_nor_gradient():
    x, scale = jax.random.normal(jax.random.key(0), (2, 37, 24)), jnp.linspace(0.5, 2, 24)
    known = lambda x, s: rms_norm(x, s, EPSILON, square_sums(x))  # noqa: E731
    _same(lambda x, s: rms_norm(x, s, EPSILON), known, (x, scale), tolerance=1e-6)
    of_gradient = lambda norm: jax.grad(lambda x: jnp.sum(jax.grad(lambda y: jnp.sum(norm(y, scale) ** 3))(x) ** 2))  # noqa: E731
    plain, second = (of_gradient(norm)(x) for norm in (lambda x, s: rms_norm(x, s, EPSILON), known))
    np.testing.assert_allclose(second, plain, rtol=1e-4, atol=1e-3)
    sums = jnp.full(x.shape[:2], 24.0)  # they are taken as they are given
    np.testing.assert_allclose(rms_norm(x, scale, 0.0, sums), x * scale[None, None], rtol=1e-6)


def _plain_norms(x, delta, scale):
    return x + delta, rms_norm(x + delta, scale, EPSILON)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("tokens", [2048, 1365])
def test_compiled_norms(tokens, dtype, tolerance):
    """Relative norm of the difference to float32 from the same inputs: bfloat16 rounds the sum and every result."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, delta = (jax.random.normal(key, (4, tokens, 960), dtype) for key in keys[:2])
    scale = 1 + 0.1 * jax.random.normal(keys[2], (960,))
    cases = [
        (_plain_norms, lambda x, d, s: add_norm(x, d, s, EPSILON), (x, delta, scale)),
        (lambda x, s: (x, rms_norm(x, s, EPSILON)), lambda x, s: skip_norm(x, s, EPSILON), (x, scale)),
    ]
    for plain, fused, arguments in cases:
        results = []
        for function, kind in ((plain, "float32"), (fused, dtype)):
            out, pull = jax.vjp(jax.jit(function), *(a.astype(kind) for a in arguments[:-1]), scale)
            grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(9), x.shape, dtype).astype(x.dtype), out)
            results.append([a.astype(jnp.float32) for a in jax.tree.leaves((out, pull(grads)))])
        for want, got in zip(*results, strict=True):
            assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < tolerance


@pytest.mark.parametrize("fusion", ["xla", "triton", "mosaic"])
def test_perf_fusion_chooses_the_kernel(fusion):
    x_BCD, scale_D = jnp.ones((1, 8, 16)), jnp.ones(16)
    for delta_BCD, kernel in ((None, "mor_skip_norm"), (x_BCD, "mor_add_norm")):
        text = str(jax.make_jaxpr(lambda x, d=delta_BCD: residual_norm(x, d, scale_D, EPSILON, fusion))(x_BCD))
        assert (kernel in text) == (fusion in ("triton", "mosaic"))

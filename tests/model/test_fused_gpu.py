"""Fused norms and SwiGLU against the plain ones, values and gradients, in Pallas' interpreter."""

from collections.abc import Callable

import jax
import numpy as np

from mor_jax.model.fused_gpu import add_norm, skip_norm, swiglu
from mor_jax.model.layers import rms_norm

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
    plain = lambda x, delta, scale: (x + delta, rms_norm(x + delta, scale, EPSILON))  # noqa: E731
    _same(plain, lambda x, delta, scale: add_norm(x, delta, scale, EPSILON), (x, delta, scale))
    _same(lambda x, s: (x, rms_norm(x, s, EPSILON)), lambda x, scale: skip_norm(x, scale, EPSILON), (x, scale))


def test_swiglu_gradient():
    gate_up = jax.random.normal(jax.random.key(1), (2, 37, 2, 48))
    _same(lambda h: jax.nn.silu(h[..., 0, :]) * h[..., 1, :], swiglu, (gate_up,))

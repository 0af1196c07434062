"""The kernel of SwiGLU's gradient against the plain one, in Pallas' interpreter, and the choice of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.kernels.swiglu import feed_forward, silu_gate, swiglu


@pytest.mark.parametrize("tokens", [37, 40])
def test_gradient(tokens):
    """74 tokens are no whole number of a program's; 80 are."""
    gate_up = jax.random.normal(jax.random.key(1), (2, tokens, 2, 48))
    grad = jax.random.normal(jax.random.key(9), (2, tokens, 48))
    (plain, pull_plain), (fused, pull_fused) = (jax.vjp(jax.jit(f), gate_up) for f in (silu_gate, swiglu))
    np.testing.assert_allclose(fused, plain, atol=2e-5)
    np.testing.assert_allclose(pull_fused(grad)[0], pull_plain(grad)[0], atol=2e-5)


@pytest.mark.parametrize(("fusion", "kernels"), [("xla", 0), ("triton", 1)])
def test_perf_fusion_chooses_the_gradient(fusion, kernels):
    arguments = jnp.ones((1, 8, 16)), jnp.ones((16, 2, 32)), jnp.ones((32, 16))
    loss = lambda x, gate_up, down: jnp.sum(feed_forward(x, gate_up, down, fusion))  # noqa: E731
    assert str(jax.make_jaxpr(jax.grad(loss))(*arguments)).count("name=mor_swiglu_gradient") == kernels

"""The products of a layer on TPU against the plain ones, and which program takes them."""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.kernels import swiglu
from mor_jax.kernels.swiglu import feed_forward
from mor_jax.kernels.tokens_innermost import project_down


def _random(*shapes):
    return [
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(3), 4), shapes, strict=False)
    ]


def _layer(x, gate_up, down):
    return feed_forward(x, gate_up, down, "xla")


def test_feed_forward(monkeypatch):
    """Values and gradients, also where gate and up are computed over again or kept by name."""
    x, gate_up, down, grad = _random((2, 7, 12), (12, 2, 20), (20, 12), (2, 7, 12))
    plain, pull_plain = jax.vjp(_layer, x, gate_up, down)
    monkeypatch.setattr(swiglu, "target_platform", lambda: "tpu")
    policy = jax.checkpoint_policies.save_only_these_names("gate_up")
    for remat in (lambda f: f, jax.checkpoint, lambda f: jax.checkpoint(f, policy=policy)):
        out, pull = jax.vjp(remat(_layer), x, gate_up, down)
        np.testing.assert_allclose(out, plain, atol=1e-5)
        for ours, theirs in zip(pull(grad), pull_plain(grad), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_named_products_are_kept(monkeypatch):
    """`names` keeps gate and up: what is computed over again has neither of their products."""
    monkeypatch.setattr(swiglu, "target_platform", lambda: "tpu")
    x, gate_up, down = _random((1, 8, 16), (16, 2, 32), (32, 16))

    def products(policy):
        layer = jax.checkpoint(lambda *a: jnp.sum(_layer(*a) ** 2), policy=policy)
        return str(jax.make_jaxpr(jax.grad(layer, (0, 1, 2)))(x, gate_up, down)).count("dot_general")

    kept = products(jax.checkpoint_policies.save_only_these_names("gate_up"))
    assert products(None) == kept + 2


def test_project_down():
    x, weight, grad = _random((2, 20, 7), (20, 12), (2, 7, 12))
    plain, pull_plain = jax.vjp(lambda x, w: jnp.einsum("BFC,FD->BCD", x, w), x, weight)
    out, pull = jax.vjp(project_down, x, weight)
    np.testing.assert_allclose(out, plain, atol=1e-5)
    for ours, theirs in zip(pull(grad), pull_plain(grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)

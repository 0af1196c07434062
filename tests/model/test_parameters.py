"""The block's gate and up in another layout: the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.model import parameters
from mor_jax.model.parameters import fill_tiles


def test_fill_tiles_changes_no_value(monkeypatch):
    gate_up = jax.random.normal(jax.random.key(0), (3, 4, 2, 6))
    params = {"block": {"ffn": {"gate_up": gate_up, "down": jnp.ones((3, 6, 4))}}}
    assert fill_tiles(params) is params  # this program is for a CPU
    monkeypatch.setattr(parameters, "target_platform", lambda: "tpu")
    laid_out = jax.jit(fill_tiles)(params)
    jax.tree.map(np.testing.assert_array_equal, laid_out, params)
    weight = jnp.arange(144.0).reshape(gate_up.shape)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fill_tiles(p)["block"]["ffn"]["gate_up"]) * weight)))(params)
    expected = jnp.cos(gate_up) * weight
    np.testing.assert_allclose(gradient["block"]["ffn"]["gate_up"], expected, rtol=1e-6, atol=1e-6)

"""The fused cross-entropy against a plain float32 log-softmax, and the memory it must not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import MeshConfig
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.loss import fused_cross_entropy, token_nll, token_scores

B, T, D, V = 3, 22, 8, 48


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    head_VD = jax.random.normal(keys[1], (V, D))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return hidden_BTD, head_VD, targets_BT, weights_BT


def _plain_loss(hidden_BTD, head_VD, rest, z_coefficient):
    targets_BT, weights_BT = rest
    logits_BTV = hidden_BTD.astype(jnp.float32) @ head_VD.T
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    z_BT = jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    return jnp.sum(weights_BT * nll_BT) + z_coefficient * jnp.sum(weights_BT * z_BT)


@pytest.mark.parametrize("chunk", [5, 11, 22, 512])
@pytest.mark.parametrize("z_coefficient", [0.0, 0.03])
def test_value_and_gradient_equal_the_plain_loss(chunk, z_coefficient):
    hidden_BTD, head_VD, *rest = _inputs()

    def fused(hidden_BTD, head_VD):
        settings = {"chunk": chunk, "z_coefficient": z_coefficient}
        return 0.25 * fused_cross_entropy(hidden_BTD, head_VD, *rest, **settings).loss_sum

    def plain(hidden_BTD, head_VD):
        return 0.25 * _plain_loss(hidden_BTD, head_VD, rest, z_coefficient)

    value, gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(hidden_BTD, head_VD)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(hidden_BTD, head_VD)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fused(hidden_BTD, head_VD), expected, rtol=1e-6)  # undifferentiated path


def test_nll_sum_carries_the_gradient_without_z_loss():
    hidden_BTD, head_VD, *rest = _inputs()
    by_loss, by_nll = (
        jax.grad(lambda h, name=name: getattr(fused_cross_entropy(h, head_VD, *rest, chunk=7), name))(hidden_BTD)
        for name in ("loss_sum", "nll_sum")
    )
    np.testing.assert_array_equal(by_loss, by_nll)


def test_bfloat16_stays_close_and_keeps_dtypes():
    hidden_BTD, head_VD, *rest = _inputs(jnp.bfloat16)
    value, (grad_BTD, grad_VD) = jax.value_and_grad(
        lambda h, w: fused_cross_entropy(h, w, *rest, chunk=8).nll_sum, argnums=(0, 1)
    )(hidden_BTD, head_VD)
    expected, (wanted_BTD, wanted_VD) = jax.value_and_grad(lambda h, w: _plain_loss(h, w, rest, 0.0), argnums=(0, 1))(
        hidden_BTD.astype(jnp.float32), head_VD
    )
    assert grad_BTD.dtype == jnp.bfloat16 and grad_VD.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    np.testing.assert_allclose(grad_BTD.astype(jnp.float32), wanted_BTD, atol=0.05)
    np.testing.assert_allclose(grad_VD, wanted_VD, atol=0.1)


def test_token_nll_equals_the_plain_loss_per_token():
    hidden_BTD, head_VD, targets_BT, _ = _inputs()
    log_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD.T)
    expected_BT = -jnp.take_along_axis(log_BTV, targets_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_nll(hidden_BTD, head_VD, targets_BT, chunk=5), expected_BT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tensor", [1, 4])
def test_token_scores_are_the_nll_and_the_first_of_the_likeliest_tokens(tensor):
    hidden_BTD, head_VD, targets_BT, _ = _inputs()
    head_VD = head_VD.at[40].set(head_VD[3])  # a tie between two shards of the vocabulary
    hidden_BTD = hidden_BTD.at[0, 0].set(3 * head_VD[3])
    nll_BT, greedy_BT = token_nll(hidden_BTD, head_VD, targets_BT, chunk=5), jnp.argmax(hidden_BTD @ head_VD.T, -1)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])):
        scores = jax.jit(lambda *arrays: token_scores(*arrays, chunk=5))(hidden_BTD, head_VD, targets_BT)
    np.testing.assert_allclose(scores[0], nll_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores[1], greedy_BT)
    assert int(greedy_BT[0, 0]) == 3 and scores[1].dtype == jnp.int32


def test_no_array_as_large_as_the_logits_exists():
    hidden_BTD, head_VD, *rest = _inputs()

    def loss(hidden_BTD, head_VD):
        return fused_cross_entropy(hidden_BTD, head_VD, *rest, chunk=2, z_coefficient=0.1).loss_sum

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden_BTD, head_VD).compile().as_text() or ""
    assert f"[{B},2,{V}]" in text or f"[{B * 2},{V}]" in text  # the search below looks for the right spelling
    sizes = {"".join(s) for s in (f"[{B},{T},{V}]", f"[{B * T},{V}]", f"[{T // 2},{B},2,{V}]", f"[{V},{B * T}]")}
    assert not [size for size in sizes if size in text]


def test_backward_multiplies_by_the_head_only_in_the_forward_chunk():
    hidden_BTD, head_VD, *rest = _inputs()

    def loss(hidden_BTD, head_VD):
        return fused_cross_entropy(hidden_BTD, head_VD, *rest, chunk=2).loss_sum

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden_BTD, head_VD))
    assert text.count("dot_general") == 3  # logits, hidden gradient, head gradient

"""Attention against a sum over visible keys, rotary embedding, and the choice of a kernel."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import PLAIN, ModelConfig
from mor_jax.errors import UserError
from mor_jax.kernels import pallas_triton
from mor_jax.kernels.attention import backend as attention_backend
from mor_jax.kernels.attention.backend import attend, resolve_backend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.rotary import apply_rotary, rotary_tables
from mor_jax.model.attention import Attention
from mor_jax.model.recurse import make_context


def _view(rows, positions=None, segments=None, valid=None) -> TokenView:
    def array(values) -> Any:
        return None if values is None else jnp.array([values])

    return TokenView(array(rows), array(rows if positions is None else positions), array(segments), array(valid))


@pytest.mark.parametrize("segments", [None, [1, 1, 2, 2, 2]], ids=["whole", "documents"])
def test_attention_is_a_softmax_over_the_visible_keys(segments):
    """Four query heads over two key/value heads: heads 0 and 1 read the first, 2 and 3 the second."""
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, 5, heads, 4)) for k, heads in zip(keys, (4, 2, 2), strict=True))
    view = _view([0, 1, 2, 3, 4], segments=segments)
    out = attend(query, key, value, Mask(view), "xla")
    for t in range(5):
        seen = [s for s in range(t + 1) if segments is None or segments[s] == segments[t]]
        for n in range(4):
            scores = np.array([np.dot(query[0, t, n], key[0, s, n // 2]) / 2.0 for s in seen])
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = sum(w * np.asarray(value[0, s, n // 2]) for w, s in zip(weights, seen, strict=True))
            np.testing.assert_allclose(out[0, t, n], expected, atol=1e-5)


def test_a_query_that_sees_nothing_stays_finite():
    view = _view([0, 1], valid=[False, False])
    ones = jnp.ones((1, 2, 1, 4))
    assert bool(jnp.all(jnp.isfinite(attend(ones, ones, ones, Mask(view), "xla"))))


def test_rotary_turns_pairs_by_position_over_theta():
    """Head width 4, theta 100: the pairs (0, 2) and (1, 3) turn by p and p / 10."""
    x_BCNH = jnp.array([[[[1.0, 0.0, 0.0, 2.0]], [[1.0, 0.0, 0.0, 2.0]]]])
    out = apply_rotary(x_BCNH, rotary_tables(jnp.array([[0, 3]]), 4, 100.0))
    np.testing.assert_allclose(out[0, 0, 0], [1, 0, 0, 2], atol=1e-6)
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(out[0, 1, 0], expected, atol=1e-6)


def test_angles_follow_the_position_not_the_row():
    """A document's layer output does not depend on where in the row the document starts."""
    config = ModelConfig(
        vocab_size=8, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8, dtype="float32"
    )
    module = Attention(config, PLAIN)
    x_BCD = jax.random.normal(jax.random.key(1), (1, 6, 8))
    apart = _view([0, 1, 2, 3, 4, 5], positions=[0, 1, 2, 0, 1, 2], segments=[1, 1, 1, 2, 2, 2])
    alone = _view([0, 1, 2])
    variables = module.init(jax.random.key(2), x_BCD, make_context(config, apart), None)
    both, _ = module.apply(variables, x_BCD, make_context(config, apart), None)
    second, _ = module.apply(variables, x_BCD[:, 3:], make_context(config, alone), None)
    np.testing.assert_allclose(both[:, 3:], second, atol=1e-6)


def test_a_kernel_that_cannot_run_here_is_refused():
    with pytest.raises(UserError, match=r"perf.attention_backend='cudnn' needs a GPU"):
        resolve_backend("cudnn", "bfloat16", 64)
    with pytest.raises(UserError, match=r"perf.attention_backend='mosaic' needs a GPU.* 9.0 \(Hopper\)"):
        resolve_backend("mosaic", "bfloat16", 64)
    assert resolve_backend("auto", "bfloat16", 64) == "xla"


@pytest.mark.parametrize(
    ("hopper", "head_dim", "devices", "chosen", "without_triton"),
    [(True, 64, 1, "mosaic", "mosaic"), (True, 128, 8, "mosaic", "mosaic"), (True, 96, 1, "cudnn", "cudnn"),
     (True, 32, 1, "triton", "cudnn"), (False, 64, 1, "triton", "cudnn"), (False, 64, 8, "cudnn", "cudnn"),
     (False, 512, 1, "xla", "xla")],
)  # fmt: skip
def test_a_gpu_gets_the_fastest_kernel_that_fits(hopper, head_dim, devices, chosen, without_triton, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = SimpleNamespace(compute_capability="9.0" if hopper else "8.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    resolve = attention_backend._resolve_backend.__wrapped__
    assert resolve("auto", "bfloat16", head_dim, devices) == chosen
    monkeypatch.setattr(pallas_triton, "plt", None)
    assert resolve("auto", "bfloat16", head_dim, devices) == without_triton
    with pytest.raises(UserError, match="attention_backend='triton': this version of JAX has no Triton backend"):
        resolve("triton", "bfloat16", head_dim, devices)

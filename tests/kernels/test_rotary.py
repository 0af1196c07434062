"""One product and one kernel for queries, keys and values against the plain path: interpreted, on a GPU compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ModelConfig, ResolvedPerf
from mor_jax.kernels import rotary as rotary_gpu
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.kernels.rotary import apply_rotary, rotary_tables, rotates_jointly, split_rotate
from mor_jax.model.attention import Attention
from mor_jax.model.layer_context import take_tokens
from mor_jax.model.recurse import make_context
from mor_jax.model.routing.select import select_mask

GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
# bfloat16: the plain path rounds at the same places, but may contract products and sums differently
TYPES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 8e-3)])
CONFIG = ModelConfig(d_model=24, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=32, dtype="float32")
CASES = ("fresh", "cached", "update", "mixed")
PLAIN, FUSED = (ResolvedPerf(attention_backend="xla", fusion=fusion) for fusion in ("xla", "triton"))


def _plain(joint_BCX, rotary, heads, kv_heads, head_dim):
    joint_BCMH = joint_BCX.reshape(*joint_BCX.shape[:2], -1, head_dim)
    query, key, value = jnp.split(joint_BCMH, [heads, heads + kv_heads], axis=2)
    return (apply_rotary(query, rotary), apply_rotary(key, rotary), value)


def _check(batch, tokens, heads, kv_heads, head_dim, dtype, tolerance, *, shared=False):
    """Values and the joint gradient, against the plain split and rotation."""
    positions_BC = jax.random.randint(jax.random.key(1), (1 if shared else batch, tokens), 0, 50 * tokens)
    rotary = rotary_tables(positions_BC, head_dim, 10_000.0)
    joint_BCX = jax.random.normal(jax.random.key(0), (batch, tokens, (heads + 2 * kv_heads) * head_dim), dtype)

    def fused(joint_BCX):
        return split_rotate(joint_BCX, rotary, heads, kv_heads)

    results = []
    for function in (lambda joint_BCX: _plain(joint_BCX, rotary, heads, kv_heads, head_dim), fused):
        out, pull = jax.vjp(jax.jit(function), joint_BCX)
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype), out)
        results.append([*out, *pull(grads)])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dtype", "tolerance"),
    [(37, 6, 2, "float32", 2e-6), (64, 3, 3, "bfloat16", 8e-3), (5, 4, 1, "float32", 2e-6)],
)
def test_values_and_gradients_of_the_kernel(tokens, heads, kv_heads, dtype, tolerance):
    """37 and 5 tokens are no multiples of a program's; a program has one key/value head."""
    _check(2, tokens, heads, kv_heads, 16, dtype, tolerance)


def test_tables_that_all_rows_share():
    _check(3, 9, 4, 2, 8, "float32", 2e-6, shared=True)


def test_all_heads_in_one_program(monkeypatch):
    monkeypatch.setattr(rotary_gpu, "HEADS", 100)
    monkeypatch.setattr(rotary_gpu, "ROWS", 16)
    _check(1, 21, 6, 3, 8, "float32", 2e-6)


def test_head_dims_that_the_kernels_take():
    for fusion in ("triton", "mosaic"):
        assert [dim for dim in range(130) if rotates_jointly(fusion, dim)] == [2, 4, 8, 16, 32, 64, 128]
    assert not rotates_jointly("xla", 64)


def _view(tokens: int) -> TokenView:
    rows_BC = jnp.tile(jnp.arange(tokens, dtype=jnp.int32)[None], (2, 1))
    return TokenView(rows_BC, rows_BC)


def _cached(tokens: int):
    shape = (2, tokens, CONFIG.num_kv_heads, CONFIG.head_dim)
    return tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(3)))


def _case(name: str):
    """(context, cached keys and values) of 11 queries by the way their keys and values come about."""
    view = _view(19)
    selection = select_mask(jnp.stack([jnp.arange(19) < 11, jnp.arange(19) >= 8]), 11)
    some = take_tokens(view, selection)
    if name == "fresh":
        return make_context(CONFIG, some, keep_kv=True), None
    if name == "cached":
        return make_context(CONFIG, some, keys=view, keep_kv=True), _cached(19)
    if name == "update":
        return make_context(CONFIG, some, keys=view, update=selection, keep_kv=True), _cached(19)
    fresh_BS = jax.random.bernoulli(jax.random.key(5), shape=(2, 11))
    return make_context(CONFIG, _view(11), fresh_BS=fresh_BS, keep_kv=True), _cached(11)


def _layer(perf: ResolvedPerf, name: str, lora=None):
    """Output, kept keys and values, and gradients of one attention layer."""
    context, cached = _case(name)
    x_BCD = jax.random.normal(jax.random.key(0), (2, 11, CONFIG.d_model))
    keys = jax.random.split(jax.random.key(1), 3)
    heads, kv_heads, head_dim = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    shapes = {
        "query": (CONFIG.d_model, heads, head_dim),
        "key_value": (CONFIG.d_model, 2, kv_heads, head_dim),
        "output": (heads, head_dim, CONFIG.d_model),
    }
    params = {name: jax.random.normal(key, shapes[name]) / 4 for name, key in zip(shapes, keys, strict=True)}

    def apply(params, x_BCD, cached):
        return Attention(CONFIG, perf).apply({"params": params}, x_BCD, context, cached, lora)

    out, pull = jax.vjp(jax.jit(apply), params, x_BCD, cached)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), out)
    return out, pull(grads)


def _agree(name: str, lora=None):
    with jax.default_matmul_precision("highest"):
        want, got = (jax.tree.leaves(_layer(perf, name, lora)) for perf in (PLAIN, FUSED))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_equals_the_plain_one(name):
    _agree(name)


def _kernels(perf: ResolvedPerf, lora=None) -> str:
    return str(jax.make_jaxpr(lambda: _layer(perf, "fresh", lora))())


def test_low_rank_updates_keep_their_own_products():
    """They are added before the rotation, so there the layer must not take the joint path."""
    down, up = jnp.ones((CONFIG.d_model, 2)) / 9, jnp.ones((2, CONFIG.num_heads, CONFIG.head_dim))
    lora = {"query": {"down": down, "up": up}}
    assert "mor_split_rotate" not in _kernels(FUSED, lora)
    assert "mor_split_rotate_gradient" in _kernels(FUSED)
    _agree("fresh", lora)


@pytest.mark.gpu
@GPU
@TYPES
@pytest.mark.parametrize("tokens", [2048, 1368, 37])
def test_compiled_kernels(tokens, dtype, tolerance):
    _check(4, tokens, 15, 5, 64, dtype, tolerance)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_layer_equals_the_plain_one(name):
    _agree(name)

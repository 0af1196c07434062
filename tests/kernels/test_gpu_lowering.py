"""The GPU's kernels and the engine's program, lowered for CUDA without a GPU: what the interpreter does not see."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mor_jax import presets
from mor_jax.config import MeshConfig, PartsConfig, ResolvedPerf
from mor_jax.errors import UserError
from mor_jax.infer.cache import CacheShape, init_cache
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.infer.engine_state import empty_control, init_state
from mor_jax.infer.paged_attention import decode_backend, prompts_backend
from mor_jax.infer.prefill import _piece, prefill
from mor_jax.infer.stages import dispatch
from mor_jax.kernels import swiglu_hopper
from mor_jax.kernels.attention import hopper as attention_hopper
from mor_jax.kernels.attention.backend import attend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.attention.triton import flash_attention
from mor_jax.kernels.choice import log_kernel
from mor_jax.kernels.norm import add_norm, skip_norm
from mor_jax.kernels.swiglu import swiglu
from mor_jax.mesh.mesh import make_mesh, on_mesh
from mor_jax.model.attention import Attention
from mor_jax.model.layers import SwiGLU
from mor_jax.model.loss import fused_cross_entropy
from mor_jax.model.recurse import make_context
from mor_jax.model.transformer import init_params

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


@pytest.fixture
def gpu(monkeypatch):
    """From here on the code takes this process's device for a GPU."""
    return lambda: monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def _lowered(function, *arguments, **static):
    """Text of the program lowered for CUDA."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return function.trace(*arguments, **static).lower(lowering_platforms=("cuda",)).as_text()


def _names(text):
    """Names of a lowered program's Triton kernels, those of a function called often once."""
    names = re.findall(r'__gpu\$xla\.gpu\.triton.*?name = "(\w+)"', text)
    assert len(names) == text.count("__gpu$xla.gpu.triton")
    return names


def _kernels(function, *arguments, **static):
    return _names(_lowered(function, *arguments, **static))


def _array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def _with_gradients(function, *arguments):
    def loss(*arguments):
        return sum(jnp.sum(out.astype(jnp.float32)) for out in jax.tree.leaves(function(*arguments)))

    return _kernels(jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))), *arguments)


@pytest.mark.parametrize("kind", ["causal", "shared", "packed"])
def test_hopper_attention_and_its_gradients(kind):
    """A kernel forward, two backward; a second layer calls the same ones."""
    queries = 1368 if kind == "shared" else 2048
    ranges = [_array(2, queries, dtype="int32")] * {"causal": 0, "shared": 1, "packed": 2}[kind]

    def loss(arrays, ranges):
        query, key, value = arrays
        start, end = (None, None, *ranges)[-2:]
        for _ in range(2):
            query = attention_hopper.flash_attention(query, key, value, start, end)
        return jnp.sum(query.astype(jnp.float32))

    arrays = (_array(2, queries, 15, 64), _array(2, 2048, 5, 64), _array(2, 2048, 5, 64))
    text = jax.jit(jax.grad(loss)).trace(arrays, ranges).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"(mor_hopper\w+)_mosaic_gpu", text)
    assert len(names) == text.count("custom_call @mosaic_gpu_v2")
    assert sorted(names) == [f"mor_hopper_attention_{name}" for name in ("forward", "grad_keys", "grad_queries")]


def test_hopper_attention_works_on_every_cards_share():
    """Two rows and two key heads of four cards: each one's kernel has one row and one key head."""
    rows_BT = jnp.tile(jnp.arange(256, dtype=jnp.int32), (2, 1))
    view = TokenView(rows_BT, rows_BT, segments_BC=jnp.zeros_like(rows_BT))
    arrays = (_array(2, 256, 6, 64), _array(2, 256, 2, 64), _array(2, 256, 2, 64))
    with on_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        function = jax.jit(lambda query, key, value: attend(query, key, value, Mask(view), "mosaic"))
        text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line)
    assert ": (tensor<1x256x3x64xbf16>, tensor<1x256x1x64xbf16>, tensor<1x256x1x64xbf16>" in call


@pytest.mark.parametrize("tokens", [1368, 1001])
def test_the_feed_forward_has_swiglu_in_the_epilogues_of_two_of_its_six_matmuls(tokens):
    """A second layer calls the same kernels; rows are filled up to a whole number of eight where they are not one."""
    config = presets.get("mor-360m-expert-r3").config.model
    layer = SwiGLU(config, ResolvedPerf(fusion="mosaic"))
    params = {"gate_up": _array(960, 2, 2560), "down": _array(2560, 960)}

    def loss(params, x_BCD):
        for _ in range(2):
            out_BCD: Any = layer.apply({"params": params}, x_BCD)
            x_BCD = out_BCD
        return jnp.sum(x_BCD.astype(jnp.float32))

    function = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = function.trace(params, _array(3, tokens, 960)).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"(mor_hopper\w+)_mosaic_gpu", text)
    assert len(names) == text.count("custom_call @mosaic_gpu_v2")
    assert sorted(names) == ["mor_hopper_gate_up_swiglu", "mor_hopper_gate_up_swiglu_gradient"]
    # outputs (the loss's gradient needs the first layer's only), gradients of inputs, of the weights
    hidden, weights = f"3x{tokens}x960", ["960x2x2560", "2560x960"]
    assert _products(text) == sorted([hidden, *2 * [hidden, *weights]])
    assert ("stablehlo.pad" in text) == (tokens == 1001)


def test_the_feed_forward_works_on_every_cards_share():
    """Two rows and 1,024 of the feed-forward on four cards: each one's kernels have one row and 512."""
    with on_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        function = jax.jit(jax.grad(lambda *a: jnp.sum(swiglu_hopper.feed_forward(*a).astype(jnp.float32)), (0, 1, 2)))
        arrays = (_array(2, 256, 128), _array(128, 2, 1024), _array(1024, 128))
        text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line]
    assert len(calls) == 2
    assert ": (tensor<256x128xbf16>, tensor<128x1024xbf16>" in calls[0]
    assert ": (tensor<256x128xbf16>, tensor<512x128xbf16>, tensor<256x2x512xbf16>" in calls[1]


@pytest.mark.parametrize("documents", [False, True])
def test_attention_and_its_gradients(documents):
    """1,368 selected queries over 2,048 keys, and packed documents: a kernel forward, two backward."""
    queries, keys = (2048, 2048) if documents else (1368, 2048)
    ranges = [_array(2, queries, dtype="int32")] * (1 + documents)

    def loss(arrays, ranges):
        (query, key, value), end = arrays, ranges[-1]
        out = flash_attention(query, key, value, ranges[0] if documents else None, end)
        return jnp.sum(out.astype(jnp.float32))

    arrays = (_array(2, queries, 15, 64), _array(2, keys, 5, 64), _array(2, keys, 5, 64))
    kernels = _kernels(jax.jit(jax.grad(loss)), arrays, ranges)
    assert kernels == [f"mor_attention_{name}" for name in ("forward", "grad_queries", "grad_keys")]


def test_norms_and_activation_with_their_gradients(gpu):
    gpu()
    hidden, scale = _array(2, 100, 960), _array(960, dtype="float32")
    assert _with_gradients(lambda x, delta, scale: add_norm(x, delta, scale, 1e-5), hidden, hidden, scale) == [
        "mor_add_norm", "mor_norm_gradient",
    ]  # fmt: skip
    assert _with_gradients(lambda x, scale: skip_norm(x, scale, 1e-5), hidden, scale) == [
        "mor_skip_norm", "mor_norm_gradient",
    ]  # fmt: skip
    assert _with_gradients(swiglu, _array(2, 100, 2, 2560)) == ["mor_swiglu_gradient"]


@pytest.mark.parametrize(("vocabulary", "logits_dtype"), [(49152, "bfloat16"), (50257, "bfloat16"), (1000, "float32")])
def test_loss_with_its_gradient(vocabulary, logits_dtype, gpu):
    """Nothing of the logits' size but products and the kernel, which writes over logits of the gradient's dtype."""
    gpu()
    arguments = (_array(2, 300, 960), _array(vocabulary, 960, dtype="float32"))
    rest = (_array(2, 300, dtype="int32"), _array(2, 300, dtype="float32"))

    def loss(arguments, targets, weights):
        hidden, head = arguments
        settings = {"chunk": 128, "z_coefficient": 1e-4, "logits_dtype": logits_dtype}
        return fused_cross_entropy(hidden, head, targets, weights, fused=True, **settings).loss_sum

    function = jax.jit(jax.value_and_grad(loss))
    assert _kernels(function, arguments, *rest) == ["mor_cross_entropy"]
    text = _lowered(function, arguments, *rest)
    assert ("output_operand_aliases = [#stablehlo" in text) == (logits_dtype == "bfloat16")


_PLAIN = PartsConfig()


def _attention_gradient(tokens, *, cached, parts=_PLAIN):
    """The gradient of an attention layer of the 360M model by its weights and input, and abstract arguments."""
    config = dataclasses.replace(presets.get("vanilla-360m").config.model, parts=parts)
    layer = Attention(config, ResolvedPerf(attention_backend="triton", fusion="triton"))
    rows_BC = jnp.zeros((2, tokens), jnp.int32)
    rows_BS = jnp.zeros((2, 2048), jnp.int32)
    own = TokenView(rows_BC, rows_BC, segments_BC=rows_BC)  # packed: plain causality would be cuDNN's
    view = TokenView(rows_BS, rows_BS, segments_BC=rows_BS)

    def loss(params, x_BCD, key_value):
        context = make_context(config, own, keys=view if cached else None)
        out_BCD, _ = layer.apply({"params": params}, x_BCD, context, key_value)
        return jnp.sum(out_BCD.astype(jnp.float32))

    width, heads, kv_heads, head_dim = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    params = {
        "query": _array(width, heads, head_dim),
        "key_value": _array(width, 2, kv_heads, head_dim),
        "output": _array(heads, head_dim, width),
    }
    if parts.qk_norm:
        params |= {name: {"scale": _array(head_dim, dtype="float32")} for name in ("query_norm", "key_norm")}
    key_value = (_array(2, 2048, kv_heads, head_dim),) * 2 if cached else None
    return jax.value_and_grad(loss, argnums=(0, 1)), (params, _array(2, tokens, width), key_value)


def _products(text):
    """Result types of the matrix products of a lowered program, such as `2x1368x1600`, sorted."""
    return sorted(re.findall(r"stablehlo.dot_general.*-> tensor<(.*)xbf16>", text))


def test_an_attention_layer_has_one_product_each_way(gpu):
    """Queries, keys and values: one product, one kernel, and one product for every gradient."""
    gpu()
    gradient, arguments = _attention_gradient(1368, cached=False)
    text = _lowered(jax.jit(gradient), *arguments)
    kernels = ["mor_split_rotate", "mor_split_rotate_gradient"]
    assert [name for name in _names(text) if "attention" not in name] == kernels
    # forward, gradient of the input, of the weight
    projection, output = ["2x1368x1600", "2x1368x960", "1600x960"], ["2x1368x960", "2x1368x15x64", "960x15x64"]
    assert _products(text) == sorted(projection + output)


def test_queries_alone_take_no_kernel(gpu):
    """It was not faster: experiments/throughput/LOG.md."""
    gpu()
    gradient, arguments = _attention_gradient(1368, cached=True)
    assert not [name for name in _names(_lowered(jax.jit(gradient), *arguments)) if "attention" not in name]


def test_norms_of_heads_leave_the_rotation_to_xla_and_say_so(gpu, caplog):
    gpu()
    log_kernel.cache_clear()
    gradient, arguments = _attention_gradient(1368, cached=False, parts=PartsConfig(qk_norm=True))
    with caplog.at_level("INFO", logger="mor_jax"):
        names = _names(_lowered(jax.jit(gradient), *arguments))
    assert names and all("attention" in name for name in names)
    assert "split and rotation: XLA (parts.qk_norm=True" in caplog.text


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("vanilla-360m", EngineOptions(max_running=32, cuts=False)),
        ("mor-360m-expert-r3", EngineOptions(max_running=32)),
        ("mor-360m-token-r3", EngineOptions(max_running=32, exit_at=1, cuts=False)),
    ],
)
def test_a_dispatch_of_the_engine(preset, options, gpu):
    """Attention of single tokens is a kernel; nothing else is one."""
    config = presets.get(preset).config.model
    config = dataclasses.replace(config, num_layers=5)

    def weights(key):
        bias_R = jnp.zeros(config.recursion.num_recursions)
        return prepare_weights(config, init_params(config, key), router_bias_R=bias_R)

    model = jax.eval_shape(weights, jax.random.key(0))
    gpu()
    shape = engine_shape(model, options)
    assert shape.backend == "pallas"
    state = jax.eval_shape(lambda model: init_state(model, shape), model)
    kernels = _kernels(dispatch, model, state, empty_control(shape.places), shape=shape)
    assert set(kernels) == {"decode_attention"}


def test_int8_has_no_kernel_for_single_tokens(gpu):
    config = presets.get("vanilla-360m").config.model
    gpu()
    assert [decode_backend(config, kv_dtype=kv_dtype) for kv_dtype in ("model", "int8")] == ["pallas", "xla"]
    with pytest.raises(UserError, match=r"backend='pallas' needs kv_dtype='model', not 'int8'"):
        decode_backend(config, "pallas", kv_dtype="int8")


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_a_chunk_of_a_prompt(kv_dtype, gpu):
    """Every layer attends by the training's forward kernel; 32 bits do not."""
    config = dataclasses.replace(presets.get("mor-360m-expert-r3").config.model, num_layers=5)
    model = jax.eval_shape(lambda key: prepare_weights(config, init_params(config, key)), jax.random.key(0))
    cache = jax.eval_shape(lambda: init_cache(config, CacheShape(2, 4096, kv_dtype=kv_dtype)))
    rows, chunk = [_array(2, dtype="int32")] * 4, _array(2, 128, dtype="int32")
    gpu()
    lowered = _lowered(prefill, model, cache, rows[0], chunk, *rows[1:])
    assert set(_names(lowered)) == {"mor_attention_forward"}
    # nothing to decide on the way, for which the host would wait
    assert not any(f"stablehlo.{branch}" in lowered for branch in ("while", "case", "if"))
    assert prompts_backend("bfloat16", 64) == "pallas" and prompts_backend("float32", 64) == "xla"


def test_a_recursion_of_a_prompt_expects_its_capacity(gpu):
    """Groups of 64 tokens for what training gives it and a tenth more, short chunks whole; elsewhere a quarter."""
    table = [(1024, 1024, 1152), (683, 1024, 768), (342, 1024, 384), (128, 128, 128), (43, 128, 128), (0.25, 1, 1)]
    assert [_piece(expected, length) for expected, length, _ in table] == [256, 256, 256, 64, 64, 64]
    gpu()
    assert [_piece(expected, length) for expected, length, _ in table] == [piece for *_, piece in table]

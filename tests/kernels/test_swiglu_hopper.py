"""The feed-forward with SwiGLU in the epilogues of its matmuls, against the plain one in float32, values and gradients.

They run in Pallas' interpreter where it can run them, and compiled on a Hopper GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gpu_interpreter import gpu_interpreter

from mor_jax.config import MeshConfig, ModelConfig, ResolvedPerf
from mor_jax.errors import UserError
from mor_jax.kernels import matmul_hopper, swiglu_hopper
from mor_jax.kernels.swiglu_hopper import feed_forward, gate_up_swiglu, gate_up_swiglu_gradient
from mor_jax.mesh.mesh import make_mesh, on_mesh
from mor_jax.model.layers import SwiGLU

RAGGED = (2, 100, 192, 512)
SHALLOW = (1, 130, 64, 256)
"""One block deep; a tile of two rows."""
FEW = (1, 8, 320, 256)
"""A warpgroup without rows; five blocks through four slots."""
ROUNDING = 4e-3
"""Relative norm of what rounding gate, up, activation and results to bfloat16 may cost."""


def _plain(x_BCD, gate_up_DXF, down_FD):
    with jax.default_matmul_precision("highest"):
        hidden = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up_DXF)
        return jnp.einsum("BCF,FD->BCD", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], down_FD)


def _inputs(rows, tokens, width, ffn):
    """Input, weights that keep its size, and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((rows, tokens, width), (width, 2, ffn), (ffn, width), (rows, tokens, width))
    scales = (1.0, width**-0.5, ffn**-0.5, 1.0)
    pairs = zip(keys, shapes, scales, strict=True)
    return [(scale * jax.random.normal(key, shape)).astype("bfloat16") for key, shape, scale in pairs]


def _compare(fused, inputs, tolerance=ROUNDING):
    *arguments, grad = inputs
    results = []
    for function, dtype in ((_plain, "float32"), (fused, "bfloat16")):
        out, pull = jax.vjp(jax.jit(function), *(a.astype(dtype) for a in arguments))
        results.append([a.astype(jnp.float32) for a in (out, *pull(grad.astype(dtype)))])
    for want, got in zip(*results, strict=True):
        assert want.shape == got.shape
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < tolerance


@pytest.mark.parametrize(
    ("shape", "multiprocessors"),
    [
        # tiles that end outside the rows; 8 and 4 of them for three thread blocks in turn, two of which start late
        (RAGGED, 3),
        (SHALLOW, 132),
        (FEW, 1),
    ],
)
def test_values_and_gradients(shape, multiprocessors, monkeypatch):
    monkeypatch.setattr(matmul_hopper, "multiprocessors", lambda: multiprocessors)
    _compare(functools.partial(feed_forward, interpret=gpu_interpreter()), _inputs(*shape))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_compiled_gates_of_any_size_are_finite():
    _check_gates()


def test_gates_of_any_size_are_finite():
    _check_gates()


def _check_gates():
    """exp2 overflows for gates under -128, where silu and its slope are 0; up and the activation's gradient are 1."""
    gates = jnp.array([-1e30, -300, -100, -5, 0, 5, 300, 1e30], "bfloat16")
    x_BCD = jnp.zeros((1, 8, 64), "bfloat16").at[0, :, 0].set(gates).at[:, :, 1].set(1)
    gate_up_DXF = jnp.zeros((64, 2, 256), "bfloat16").at[0, 0].set(1).at[1, 1].set(1)
    gated, hidden = gate_up_swiglu(gpu_interpreter(), x_BCD, gate_up_DXF)
    down_FD = jnp.zeros((256, 64), "bfloat16").at[:, 1].set(1)
    grads = gate_up_swiglu_gradient(gpu_interpreter(), x_BCD, down_FD, hidden).astype(jnp.float32)
    gates = gates.astype(jnp.float32)
    silu, slope = jax.nn.silu(gates), jax.vmap(jax.grad(jax.nn.silu))(gates)
    for got, want in ((gated[0, :, 7], silu), (grads[0, :, 0, 9], slope), (grads[0, :, 1, 200], silu)):
        assert jnp.allclose(got.astype(jnp.float32), want, rtol=5e-3, atol=1e-6), (got, want)


def test_the_layer_takes_it_where_perf_says_so(monkeypatch):
    """The layer's own weights, gate first; its result is that of the plain layer."""
    config = ModelConfig(d_model=64, d_ff=256, dtype="bfloat16")
    kernels = functools.partial(feed_forward, interpret=gpu_interpreter())
    calls = []
    monkeypatch.setattr(swiglu_hopper, "feed_forward", lambda *arguments: calls.append(1) or kernels(*arguments))
    x_BCD, gate_up_DXF, down_FD, grad_BCD = _inputs(1, 40, 64, 256)

    def layer(fusion):
        def run(x_BCD, gate_up_DXF, down_FD):
            params = {"gate_up": gate_up_DXF, "down": down_FD}
            out_BCD: Any = SwiGLU(config, ResolvedPerf(fusion=fusion)).apply({"params": params}, x_BCD)
            return out_BCD

        return run

    _compare(layer("mosaic"), (x_BCD, gate_up_DXF, down_FD, grad_BCD))
    assert calls == [1]
    for fusion in ("xla", "auto", "triton"):
        layer(fusion)(x_BCD, gate_up_DXF, down_FD)
    assert calls == [1]


@pytest.mark.parametrize(("target", "expected"), [("down", []), ("gate_up", []), ("query", [1])])
def test_low_rank_updates_of_the_feed_forward_keep_it_apart(target, expected, monkeypatch):
    """They need what the kernels keep to themselves; updates of the attention do not concern them."""
    calls = []
    monkeypatch.setattr(swiglu_hopper, "feed_forward", lambda *arguments: calls.append(1) or arguments[0])
    config = ModelConfig(d_model=64, d_ff=256, dtype="bfloat16")
    x_BCD, gate_up_DXF, down_FD, _ = _inputs(1, 8, 64, 256)
    shapes = {"down": ((256, 2), (2, 64)), "gate_up": ((64, 2), (2, 2, 256)), "query": ((64, 2), (2, 1, 64))}
    lora = {target: {name: jnp.ones(shape) for name, shape in zip(("down", "up"), shapes[target], strict=True)}}
    layer = SwiGLU(config, ResolvedPerf(fusion="mosaic"))
    layer.apply({"params": {"gate_up": gate_up_DXF, "down": down_FD}}, x_BCD, lora)
    assert calls == expected


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_shares_of_several_devices_make_the_whole(mesh, monkeypatch):
    """Who gets which share, and sums over shares; the interpreter has one device, so products stand for the kernels."""

    def gate_up_swiglu(_, x_BCD, gate_up_DXF):
        hidden_BCXF = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up_DXF)
        shares.append((x_BCD.shape, gate_up_DXF.shape))
        return jax.nn.silu(hidden_BCXF[:, :, 0]) * hidden_BCXF[:, :, 1], hidden_BCXF

    def gate_up_swiglu_gradient(_, grad_BCD, down_FD, hidden_BCXF):
        gradient = jax.vjp(lambda h: jax.nn.silu(h[:, :, 0]) * h[:, :, 1], hidden_BCXF)[1]
        return gradient(jnp.einsum("BCD,FD->BCF", grad_BCD, down_FD))[0]

    shares = []
    monkeypatch.setattr(swiglu_hopper, "gate_up_swiglu", gate_up_swiglu)
    monkeypatch.setattr(swiglu_hopper, "gate_up_swiglu_gradient", gate_up_swiglu_gradient)
    with on_mesh(make_mesh(mesh, jax.devices()[:4])):
        _compare(feed_forward, _inputs(4, 24, 64, 512), tolerance=1e-2)  # gate and up are rounded before silu here
    rows = 4 // (mesh.data * mesh.fsdp)
    assert set(shares) == {((rows, 24, 64), (64, 2, 512 // mesh.tensor))}


@pytest.mark.parametrize(
    ("width", "ffn", "dtype", "message"),
    [
        (96, 256, "bfloat16", "d_model=96 must be a multiple of 64"),
        (64, 384, "bfloat16", "d_ff=384 must be a multiple of 256"),
        (64, 256, "float32", "dtype=float32 must be bfloat16"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(width, ffn, dtype, message):
    with pytest.raises(UserError, match=message):
        feed_forward(jnp.zeros((1, 8, width), dtype), jnp.zeros((width, 2, ffn), dtype), jnp.zeros((ffn, width), dtype))


def test_a_device_needs_whole_tiles_of_the_feed_forward():
    """Else columns at the end would never be written."""
    *arguments, _ = _inputs(2, 8, 64, 768)
    with (
        on_mesh(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])),
        pytest.raises(UserError, match="d_ff=768 must be a multiple of 512, 256 per device"),
    ):
        feed_forward(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    "shape", [(4, 1368, 960, 2560), (3, 1001, 576, 1536), (1, 1024, 2048, 8192), RAGGED, SHALLOW, FEW]
)
def test_compiled(shape):
    """At the sizes of 360M, 135M and 1.7B, rows that are no whole number of tiles among them; what is interpreted."""
    _compare(feed_forward, _inputs(*shape))

"""The gated feed-forward (SwiGLU): plain, its gradient in Pallas (Triton), all of it in ``swiglu_hopper``, or for TPU.

XLA reads gate and up twice in the gradient; the kernel reads and writes every tensor once. Letters: B rows, C tokens of
a row, M tokens of all rows, D model, X gate and up, F feed-forward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from mor_jax.config import Kernels
from mor_jax.kernels import swiglu_hopper, tokens_innermost
from mor_jax.kernels.choice import log_kernel
from mor_jax.kernels.padding import pad_axis
from mor_jax.kernels.pallas_triton import call_kernel, fuses
from mor_jax.mesh.axes import on_shards
from mor_jax.mesh.devices import target_platform

ROWS = 8
"""Rows of a program of the gradient."""
WARPS = 8


def feed_forward(
    x_BCD: jax.Array,
    gate_up_DXF: jax.Array,
    down_FD: jax.Array,
    fusion: Kernels,
    update: Callable[[Any, jax.Array], jax.Array | float] | None = None,
) -> jax.Array:
    """(silu(x W_gate) * x W_up) W_down, by the kernels that ``perf.fusion`` stands for.

    Args:
        x_BCD: input.
        gate_up_DXF: [D, 2, F]: W_gate, W_up, in x's dtype.
        down_FD: in x's dtype.
        fusion: a resolved ``perf.fusion``.
        update: what is added to the product by the weights of a name (`gate_up`, `down`) with an input; None is
            nothing. It needs the products, which the kernels of `mosaic` keep to themselves, so it keeps them apart;
            a TPU then takes the plain form.

    Returns:
        [B, C, D].
    """
    if fusion == "mosaic" and update is None:
        log_kernel("feed-forward", "Mosaic, SwiGLU in the epilogues of its matmuls")
        return swiglu_hopper.feed_forward(x_BCD, gate_up_DXF, down_FD)
    if target_platform() == "tpu" and update is None:
        return tokens_innermost.feed_forward(x_BCD, gate_up_DXF, down_FD)
    update = update or (lambda *_: 0.0)
    hidden_BCXF = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up_DXF) + update("gate_up", x_BCD)
    hidden_BCXF = checkpoint_name(hidden_BCXF, "gate_up")
    gated_BCF = swiglu(hidden_BCXF) if fuses("gradient of SwiGLU", fusion) else silu_gate(hidden_BCXF)
    return jnp.einsum("BCF,FD->BCD", gated_BCF, down_FD) + update("down", gated_BCF)


def silu_gate(gate_up_BCXF: jax.Array) -> jax.Array:
    """silu(gate) * up of [B, C, 2, F]: [B, C, F]."""
    return jax.nn.silu(gate_up_BCXF[..., 0, :]) * gate_up_BCXF[..., 1, :]


def swiglu(gate_up_BCXF: jax.Array) -> jax.Array:
    """``silu_gate`` whose gradient is a kernel, which reads each of its three inputs once."""
    local: Any = _swiglu
    return on_shards(local, (("batch", "sequence", None, "ffn"),), ("batch", "sequence", "ffn"))(gate_up_BCXF)


@jax.custom_vjp
def _swiglu(gate_up: jax.Array) -> jax.Array:
    return silu_gate(gate_up)


def _swiglu_forward(gate_up):
    return _swiglu(gate_up), gate_up


def _swiglu_gradient_kernel(gate_ref: Any, up_ref: Any, grad_ref: Any, out_ref: Any) -> None:
    gate, up, grad = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref, grad_ref))
    share = jax.nn.sigmoid(gate)
    grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    out_ref[:, 0, :] = grad_gate.astype(out_ref.dtype)
    out_ref[:, 1, :] = (grad * gate * share).astype(out_ref.dtype)


def _swiglu_backward(gate_up, grad):
    width = grad.shape[-1]
    gate_up_MXF, grad_MF = gate_up.reshape(-1, 2, width), grad.reshape(-1, width)
    rows = grad_MF.shape[0]
    columns = width & -width  # the largest power of two that divides F
    columns = min(columns, 1024)
    half = lambda x: pl.BlockSpec((ROWS, None, columns), lambda i, j: (i, x, j))  # noqa: E731
    gate_up_MXF, grad_MF = (pad_axis(x, 0, ROWS) for x in (gate_up_MXF, grad_MF))
    out_MXF = call_kernel(
        _swiglu_gradient_kernel,
        "mor_swiglu_gradient",
        warps=WARPS,
        grid=(grad_MF.shape[0] // ROWS, width // columns),
        in_specs=[half(0), half(1), pl.BlockSpec((ROWS, columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((ROWS, 2, columns), lambda i, j: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct(gate_up_MXF.shape, gate_up.dtype),
    )(gate_up_MXF, gate_up_MXF, grad_MF)
    return (out_MXF[:rows].reshape(gate_up.shape),)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)

"""RMSNorm of the residual stream: plain, and for NVIDIA GPUs in Pallas (Triton), in one pass over memory.

XLA reads the rows of a norm twice in either direction; the kernels read and write every tensor once. Under a mesh every
device works on its own share: a token's norm needs all of its width, which no axis splits. Letters: B rows, C tokens of
a row, M tokens of all rows, D model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mor_jax.config import Kernels
from mor_jax.kernels.pallas_triton import call_kernel, fuses, plt
from mor_jax.mesh.axes import on_shards

_HIDDEN = ("batch", "sequence", None)
_SCALE = (None,)
ROWS = 4
"""Rows of a norm in registers at once."""
WARPS = 4
"""Of a norm's programs."""
GRAD_ROWS = 4
"""Rows of a norm's gradient in registers at once."""
GRAD_WARPS = 4
GRAD_CHUNK = 32
"""Rows per program of the norm's gradient: each writes one partial sum of the scale's gradient."""


def rms_norm(x_BCD: jax.Array, scale: jax.Array, epsilon: float, squares_BC: jax.Array | None = None) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype.

    Args:
        x_BCD: of any leading axes.
        scale: [D] or [B, 1, D].
        epsilon: under the root.
        squares_BC: ``square_sums`` of x, where they are known: they are not computed again, in neither direction.

    Returns:
        The norm; its gradient in x is the same with ``squares_BC`` or without.
    """
    x32_BCD = x_BCD.astype(jnp.float32)
    if squares_BC is None:
        mean_BC1 = jnp.mean(jnp.square(x32_BCD), axis=-1, keepdims=True)
    else:
        mean_BC1 = _known_sums(x32_BCD, squares_BC)[..., None] / x_BCD.shape[-1]
    inverse_BC1 = jax.lax.rsqrt(mean_BC1 + epsilon)
    scale_BCD = scale[None, None, :] if scale.ndim == 1 else scale
    return (x32_BCD * inverse_BC1 * scale_BCD.astype(jnp.float32)).astype(x_BCD.dtype)


def square_sums(x_BCD: jax.Array) -> jax.Array:
    """Sum x's squares over the last axis in float32, as ``rms_norm`` takes them: no gradient goes this way."""
    return jax.lax.stop_gradient(jnp.sum(jnp.square(x_BCD.astype(jnp.float32)), axis=-1))


@jax.custom_jvp
def _known_sums(x32_BCD: jax.Array, squares_BC: jax.Array) -> jax.Array:
    return squares_BC


@_known_sums.defjvp
def _known_sums_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x32_BCD, squares_BC), (dx_BCD, _) = primals, tangents
    return _known_sums(x32_BCD, squares_BC), jnp.sum(2.0 * x32_BCD * dx_BCD, axis=-1)


def residual_norm(
    x_BCD: jax.Array,
    delta_BCD: jax.Array | None,
    scale: jax.Array,
    epsilon: float,
    fusion: Kernels,
    squares_BC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Add to the residual stream and normalise it, by the kernel that ``perf.fusion`` stands for.

    Args:
        x_BCD: the stream.
        delta_BCD: what is added; None is nothing.
        scale: [D]; without a kernel also [B, 1, D].
        epsilon: under the root.
        fusion: a resolved ``perf.fusion``.
        squares_BC: ``square_sums`` of x if nothing is added, or None; the kernels compute their own.

    Returns:
        (x + delta, its norm) in x's dtype; both feed on, so that a kernel can add their gradients in its one pass.
    """
    if fuses("norm", fusion):
        return skip_norm(x_BCD, scale, epsilon) if delta_BCD is None else add_norm(x_BCD, delta_BCD, scale, epsilon)
    assert delta_BCD is None or squares_BC is None
    x_BCD = x_BCD if delta_BCD is None else x_BCD + delta_BCD
    return x_BCD, rms_norm(x_BCD, scale, epsilon, squares_BC)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _inside(row: Any, shape: tuple[int, int], rows: int, width: int) -> jax.Array:
    """bool: which entries of a block that starts at ``row`` lie inside [rows, width]."""
    in_row = row + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < rows
    return in_row & (jax.lax.broadcasted_iota(jnp.int32, shape, 1) < width)


def add_norm(x_BCD: jax.Array, delta_BCD: jax.Array, scale_D: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return (x + delta, its RMSNorm), each [B, C, D] in x's dtype; the gradients of both meet in one pass."""

    def local(x_BCD: jax.Array, delta_BCD: jax.Array, scale_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        add: Any = _add_norm
        total, normed = add(epsilon, _flat(x_BCD), _flat(delta_BCD), scale_D.astype(jnp.float32))
        return total.reshape(x_BCD.shape), normed.reshape(x_BCD.shape)

    return on_shards(local, (_HIDDEN, _HIDDEN, _SCALE), (_HIDDEN, _HIDDEN))(x_BCD, delta_BCD, scale_D)


def skip_norm(x_BCD: jax.Array, scale_D: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return (x, its RMSNorm), each [B, C, D]; x comes back so that both its gradients are added in one pass."""

    def local(x_BCD: jax.Array, scale_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        skip: Any = _skip_norm
        same, normed = skip(epsilon, _flat(x_BCD), scale_D.astype(jnp.float32))
        return same.reshape(x_BCD.shape), normed.reshape(x_BCD.shape)

    return on_shards(local, (_HIDDEN, _SCALE), (_HIDDEN, _HIDDEN))(x_BCD, scale_D)


def _norm_kernel(scale_ref: Any, *refs: Any, size: Any) -> None:
    """``refs`` are x and its norm, or x, delta, their sum and its norm."""
    rows, width, epsilon = size
    *inputs, normed_ref = refs
    inside = _inside(pl.program_id(0) * ROWS, normed_ref.shape, rows, width)
    load = lambda ref: plt.load(ref, mask=inside, other=0.0).astype(jnp.float32)  # noqa: E731
    x32 = load(inputs[0])
    if len(inputs) == 3:
        _, delta_ref, total_ref = inputs
        total = (x32 + load(delta_ref)).astype(total_ref.dtype)
        plt.store(total_ref, total, mask=inside)
        x32 = total.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=1) / width + epsilon)
    normed = x32 * inverse[:, None] * scale_ref[...][None, :]
    plt.store(normed_ref, normed.astype(normed_ref.dtype), mask=inside)


def _norm(name: str, epsilon: float, scale_D: jax.Array, *inputs_MD: jax.Array) -> list[jax.Array]:
    """Return [norm of x], or of x and delta [x + delta, its norm]."""
    rows, width = inputs_MD[0].shape
    padded = pl.next_power_of_2(width)
    block = pl.BlockSpec((ROWS, padded), lambda i: (i, 0))
    return call_kernel(
        functools.partial(_norm_kernel, size=(rows, width, epsilon)),
        name,
        warps=WARPS,
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[pl.BlockSpec((padded,), lambda _: (0,)), *[block] * len(inputs_MD)],
        out_specs=[block] * len(inputs_MD),
        out_shape=[jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype) for x_MD in inputs_MD],
    )(jnp.pad(scale_D, (0, padded - width)), *inputs_MD)


def _add_norm_forward(epsilon, x_MD, delta_MD, scale_D):
    total, normed = _norm("mor_add_norm", epsilon, scale_D, x_MD, delta_MD)
    return (total, normed), (total, scale_D)


def _norm_gradient_kernel(
    x_ref: Any, scale_ref: Any, skip_ref: Any, grad_ref: Any, grad_x_ref: Any, grad_scale_ref: Any, *, size: Any
) -> None:
    rows, width, epsilon = size
    scale = scale_ref[...][None, :]
    first = pl.program_id(0) * GRAD_CHUNK

    def step(index: Any, grad_scale: Any) -> Any:
        block = (pl.ds(index * GRAD_ROWS, GRAD_ROWS), slice(None))
        inside = _inside(first + index * GRAD_ROWS, (GRAD_ROWS, x_ref.shape[1]), rows, width)
        load = lambda ref: plt.load(ref.at[block], mask=inside, other=0.0).astype(jnp.float32)  # noqa: E731
        x, grad = load(x_ref), load(grad_ref)
        inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / width + epsilon)[:, None]
        unit = x * inverse
        scaled = grad * scale
        mean = jnp.sum(scaled * unit, axis=1)[:, None] / width
        grad_x = load(skip_ref) + inverse * (scaled - unit * mean)
        plt.store(grad_x_ref.at[block], grad_x.astype(grad_x_ref.dtype), mask=inside)
        return grad_scale + jnp.sum(grad * unit, axis=0)

    zero = jnp.zeros((x_ref.shape[1],), jnp.float32)
    grad_scale_ref[...] = jax.lax.fori_loop(0, GRAD_CHUNK // GRAD_ROWS, step, zero)


def _norm_gradient(epsilon, x_MD, scale_D, skip_MD, grad_MD):
    rows, width = x_MD.shape
    padded, programs = pl.next_power_of_2(width), pl.cdiv(rows, GRAD_CHUNK)
    block = pl.BlockSpec((GRAD_CHUNK, padded), lambda i: (i, 0))
    grad_x, grad_scale = call_kernel(
        functools.partial(_norm_gradient_kernel, size=(rows, width, epsilon)),
        "mor_norm_gradient",
        warps=GRAD_WARPS,
        grid=(programs,),
        in_specs=[block, pl.BlockSpec((padded,), lambda _: (0,)), block, block],
        out_specs=[block, pl.BlockSpec((None, padded), lambda i: (i, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype),
            jax.ShapeDtypeStruct((programs, padded), jnp.float32),
        ],
    )(x_MD, jnp.pad(scale_D, (0, padded - width)), skip_MD, grad_MD)
    return grad_x, jnp.sum(grad_scale, axis=0)[:width]


def _add_norm_backward(epsilon, residuals, grads):
    grad_x, grad_scale = _norm_gradient(epsilon, *residuals, *grads)
    return grad_x, grad_x, grad_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(epsilon, x_MD, delta_MD, scale_D):
    return _add_norm_forward(epsilon, x_MD, delta_MD, scale_D)[0]


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _skip_norm(epsilon, x_MD, scale_D):
    return x_MD, *_norm("mor_skip_norm", epsilon, scale_D, x_MD)


def _skip_norm_forward(epsilon, x_MD, scale_D):
    return _skip_norm(epsilon, x_MD, scale_D), (x_MD, scale_D)


def _skip_norm_backward(epsilon, residuals, grads):
    return _norm_gradient(epsilon, *residuals, *grads)


_skip_norm.defvjp(_skip_norm_forward, _skip_norm_backward)

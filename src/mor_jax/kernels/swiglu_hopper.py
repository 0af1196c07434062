"""The gated feed-forward for Hopper GPUs: SwiGLU in the epilogues of its matrix products (Pallas, Mosaic GPU).

The kernel that multiplies by the weights of gate and up writes both and their activation, so that none is read again
for it. The kernel that multiplies the output's gradient by the down projection reads gate and up and writes their
gradients: the activation's gradient is never in memory. The other four products are XLA's.

Letters: B rows, C tokens of a row, M tokens of all rows, D model, X gate and up, F feed-forward.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mor_jax.errors import require
from mor_jax.kernels.hopper_launch import COPY_MULTIPLE
from mor_jax.kernels.matmul_hopper import (
    BLOCK_ROWS,
    COLUMNS,
    DEPTH,
    call_matmul,
    matmul_tile,
    own_rows,
    piece_columns,
    plan_tiles,
    run_tiles,
    store,
)
from mor_jax.kernels.padding import pad_axis
from mor_jax.mesh.axes import axis_size, on_shards
from mor_jax.mesh.devices import is_hopper

_HIDDEN, _GATED, _PAIR = ("batch", "sequence", None), ("batch", "sequence", "ffn"), ("batch", "sequence", None, "ffn")


def is_available(dtype: str, width: int, ffn: int) -> bool:
    """Whether this process's device is a Hopper GPU, and the kernels take such a feed-forward.

    Args:
        dtype: of activations and weights.
        width: of the model.
        ffn: width of the feed-forward on one device.
    """
    return is_hopper() and dtype == "bfloat16" and width % DEPTH == 0 and ffn % COLUMNS == 0


def feed_forward(x_BCD: jax.Array, gate_up_DXF: jax.Array, down_FD: jax.Array, *, interpret: Any = None) -> jax.Array:
    """(silu(x W_gate) * x W_up) W_down; the activation is computed in float32 from unrounded products.

    Args:
        x_BCD: bfloat16.
        gate_up_DXF: bfloat16, [D, 2, F]: W_gate, W_up.
        down_FD: bfloat16.
        interpret: parameters of Pallas' GPU interpreter, for tests on any device.

    Returns:
        [B, C, D], bfloat16.

    Raises:
        UserError: widths or a dtype that the kernels do not take.
    """
    width, ffn = x_BCD.shape[-1], down_FD.shape[0]
    require(x_BCD.dtype == jnp.bfloat16, f"feed-forward on Hopper: dtype={x_BCD.dtype} must be bfloat16")
    require(width % DEPTH == 0, f"feed-forward on Hopper: d_model={width} must be a multiple of {DEPTH}")
    share = COLUMNS * axis_size("tensor")
    require(ffn % share == 0, f"feed-forward on Hopper: d_ff={ffn} must be a multiple of {share}, {COLUMNS} per device")
    function: Any = _feed_forward
    return function(interpret, x_BCD, gate_up_DXF, down_FD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(interpret: Any, x_BCD: jax.Array, gate_up_DXF: jax.Array, down_FD: jax.Array) -> jax.Array:
    return _forward(interpret, x_BCD, gate_up_DXF, down_FD)[0]


def _forward(interpret: Any, x_BCD: jax.Array, gate_up_DXF: jax.Array, down_FD: jax.Array) -> tuple[jax.Array, Any]:
    local = functools.partial(gate_up_swiglu, interpret)
    gated_BCF, hidden_BCXF = on_shards(local, (_HIDDEN, (None, None, "ffn")), (_GATED, _PAIR))(x_BCD, gate_up_DXF)
    out_BCD = jnp.einsum("BCF,FD->BCD", gated_BCF, down_FD)
    return out_BCD, (x_BCD, gate_up_DXF, down_FD, gated_BCF, hidden_BCXF)


def _backward(interpret: Any, residuals: Any, grad_BCD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BCD, gate_up_DXF, down_FD, gated_BCF, hidden_BCXF = residuals
    local = functools.partial(gate_up_swiglu_gradient, interpret)
    shards = on_shards(local, (_HIDDEN, ("ffn", None), _PAIR), _PAIR)
    grad_BCXF = shards(grad_BCD, down_FD, hidden_BCXF)
    return (
        jnp.einsum("BCXF,DXF->BCD", grad_BCXF, gate_up_DXF),
        jnp.einsum("BCD,BCXF->DXF", x_BCD, grad_BCXF),
        jnp.einsum("BCF,BCD->FD", gated_BCF, grad_BCD),
    )


_feed_forward.defvjp(_forward, _backward)


def _token_rows(x: jax.Array) -> jax.Array:
    """Tokens of all rows on one axis, padded as the copy engine wants them."""
    return pad_axis(x.reshape(-1, *x.shape[2:]), 0, COPY_MULTIPLE)


def _sigmoid(x: jax.Array) -> jax.Array:
    """Logistic function; 1 / y as rsqrt(y)^2, which costs less than a division that rounds exactly."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -math.log2(math.e)))
    return root * root


def _interleave(gate_up_DXF: jax.Array) -> jax.Array:
    """[D, 2 F]: 64 columns of gate, 64 of up, and so on, so that a tile of the product holds both."""
    depth, _, ffn = gate_up_DXF.shape
    return gate_up_DXF.reshape(depth, 2, ffn // DEPTH, DEPTH).swapaxes(1, 2).reshape(depth, 2 * ffn)


@functools.partial(jax.jit, static_argnums=0)
def gate_up_swiglu(interpret: Any, x_BCD: jax.Array, gate_up_DXF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return silu(gate) * up [B, C, F], and gate and up [B, C, 2, F], of one device's share; all bfloat16.

    Args:
        interpret: parameters of Pallas' GPU interpreter; None compiles.
        x_BCD: any number of tokens; D a multiple of ``DEPTH``.
        gate_up_DXF: [D, 2, F], F a multiple of ``COLUMNS`` / 2.
    """
    batch, length, width = x_BCD.shape
    ffn, x_MD = gate_up_DXF.shape[-1], _token_rows(x_BCD)
    rows = x_MD.shape[0]
    walk = plan_tiles(rows, width, 2 * ffn)

    def body(x_ref, weight_ref, gated_ref, hidden_ref, *, a_smem, b_smem, out_smem, ring) -> None:
        def copy(row: Any, column: Any, block: Any, slot: Any, barrier: Any, in_epilogue: bool) -> None:
            assert not in_epilogue
            depth = pl.ds(block * DEPTH, DEPTH)
            tokens, columns = pl.ds(row * BLOCK_ROWS, BLOCK_ROWS), pl.ds(column * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(x_ref.at[tokens, depth], a_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(weight_ref.at[depth, columns], b_smem.at[slot], barrier)

        def compute(row: Any, column: Any, done: Any) -> None:
            multiply = lambda acc, slot: plgpu.wgmma(acc, a_smem.at[slot, own_rows()], b_smem.at[slot])  # noqa: E731
            product, tokens = matmul_tile(walk, ring, done, multiply), own_rows(row)
            for piece in range(COLUMNS // 2 // DEPTH):
                gate, up = (product[:, (2 * piece + x) * DEPTH :][:, :DEPTH] for x in range(2))
                columns = piece_columns(column, COLUMNS // 2, piece)
                store(out_smem, 3 * piece, gate, hidden_ref.at[tokens, 0, columns])
                store(out_smem, 3 * piece + 1, up, hidden_ref.at[tokens, 1, columns])
                store(out_smem, 3 * piece + 2, gate * _sigmoid(gate) * up, gated_ref.at[tokens, columns])

        run_tiles(walk, ring, copy, compute)

    out = (
        jax.ShapeDtypeStruct((rows, ffn), x_BCD.dtype),
        jax.ShapeDtypeStruct((rows, 2, ffn), x_BCD.dtype),
    )
    operands = (x_MD, _interleave(gate_up_DXF))
    gated, hidden = call_matmul(
        body,
        "mor_hopper_gate_up_swiglu",
        walk,
        operands=operands,
        out=out,
        block=(DEPTH, COLUMNS),
        interpret=interpret,
    )
    gated, hidden = (a[: batch * length] for a in (gated, hidden))
    return gated.reshape(batch, length, ffn), hidden.reshape(batch, length, 2, ffn)


@functools.partial(jax.jit, static_argnums=0)
def gate_up_swiglu_gradient(
    interpret: Any, grad_BCD: jax.Array, down_FD: jax.Array, hidden_BCXF: jax.Array
) -> jax.Array:
    """Return the gradient of gate and up [B, C, 2, F] of one device's share; all bfloat16.

    Args:
        interpret: parameters of Pallas' GPU interpreter; None compiles.
        grad_BCD: of the feed-forward's output; D a multiple of ``DEPTH``.
        down_FD: the down projection, by whose transpose it is multiplied; F a multiple of ``COLUMNS``.
        hidden_BCXF: gate and up [B, C, 2, F].
    """
    batch, length, width = grad_BCD.shape
    ffn, grad_MD = down_FD.shape[0], _token_rows(grad_BCD)
    rows, pieces = grad_MD.shape[0], COLUMNS // DEPTH
    walk = plan_tiles(rows, width, ffn, epilogue_blocks=pieces)

    def body(grad_ref, weight_ref, hidden_ref, out_ref, *, a_smem, b_smem, out_smem, ring) -> None:
        def copy(row: Any, column: Any, block: Any, slot: Any, barrier: Any, in_epilogue: bool) -> None:
            tokens = pl.ds(row * BLOCK_ROWS, BLOCK_ROWS)
            if in_epilogue:  # gate and up go where blocks of the operands go
                columns = piece_columns(column, COLUMNS, block - walk.depth_blocks)
                gate, up = (hidden_ref.at[tokens, x, columns] for x in range(2))
                plgpu.copy_gmem_to_smem(gate, a_smem.at[slot], barrier)
                plgpu.copy_gmem_to_smem(up, b_smem.at[slot, pl.ds(0, BLOCK_ROWS)], barrier)
                return
            depth, columns = pl.ds(block * DEPTH, DEPTH), pl.ds(column * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(grad_ref.at[tokens, depth], a_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(weight_ref.at[columns, depth], b_smem.at[slot], barrier)

        def multiply(accumulator: Any, slot: Any) -> None:
            plgpu.wgmma(accumulator, a_smem.at[slot, own_rows()], b_smem.at[slot].transpose((1, 0)))

        def compute(row: Any, column: Any, done: Any) -> None:
            product, tokens = matmul_tile(walk, ring, done, multiply), own_rows(row)
            for piece in range(pieces):
                step = done + walk.depth_blocks + piece
                slot = ring.wait(step)
                gate, up = (smem[slot, own_rows()].astype(jnp.float32) for smem in (a_smem, b_smem))
                ring.free(step)
                grad, columns = product[:, piece * DEPTH :][:, :DEPTH], piece_columns(column, COLUMNS, piece)
                share = _sigmoid(gate)
                silu = gate * share
                by_gate = grad * up * (share + silu * (1.0 - share))
                store(out_smem, 2 * piece, by_gate, out_ref.at[tokens, 0, columns])
                store(out_smem, 2 * piece + 1, grad * silu, out_ref.at[tokens, 1, columns])

        run_tiles(walk, ring, copy, compute)

    out = jax.ShapeDtypeStruct((rows, 2, ffn), grad_BCD.dtype)
    operands = (grad_MD, down_FD, _token_rows(hidden_BCXF))
    grad = call_matmul(
        body,
        "mor_hopper_gate_up_swiglu_gradient",
        walk,
        operands=operands,
        out=out,
        block=(COLUMNS, DEPTH),
        interpret=interpret,
    )
    return grad[: batch * length].reshape(hidden_BCXF.shape)

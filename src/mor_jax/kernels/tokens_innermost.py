"""Products of a layer on TPU, whose tensors lie with tokens innermost (letters: B C D F, gate and up X).

XLA lays them out so around the attention kernel, which takes heads by tokens: 2,048 tokens are whole tiles of 128
lanes. Written as here, every product of a layer has a fusion of its own, which computes nothing twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mor_jax.kernels.gradients import gradients_together
from mor_jax.mesh.axes import axis_size


def feed_forward(x_BCD: jax.Array, gate_up_DXF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x W_gate) * x W_up) W_down.

    Args:
        x_BCD: input.
        gate_up_DXF: [D, 2, F]: W_gate, W_up, in x's dtype.
        down_FD: in x's dtype.

    Returns:
        [B, C, D].
    """
    products = (jnp.einsum("BCD,DF->BFC", x_BCD, _finished(gate_up_DXF[:, index])) for index in (0, 1))
    # both gradients are finished before a product reads them
    gate_BFC, up_BFC = gradients_together(*(checkpoint_name(x_BFC, "gate_up") for x_BFC in products))
    # without the barrier the last product would compute its input over again for each of its tiles
    gated_BFC = jax.lax.optimization_barrier(jax.nn.silu(gate_BFC) * up_BFC)
    return project_down(gated_BFC, down_FD)


def _finished(weight_DF: jax.Array) -> jax.Array:
    """Finish a half's gradient by itself, where it is summed over slices.

    The compiler (libtpu 0.0.50.1) would sum and cut it straight into [D, 2, F], which it cannot
    ("AllReduceScatterFusion not implemented for 2nd-minor compaction").
    """
    return gradients_together(weight_DF)[0] if axis_size("slice") > 1 else weight_DF


@jax.custom_vjp
def project_down(x_BFC: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """Project features (of a feed-forward, or heads) back to the width of the model.

    Args:
        x_BFC: features by tokens.
        weight_FD: in x's dtype.

    Returns:
        [B, C, D].
    """
    return jnp.einsum("BFC,FD->BCD", x_BFC, weight_FD)


def _project_down_forward(x_BFC: jax.Array, weight_FD: jax.Array) -> Any:
    return project_down(x_BFC, weight_FD), (x_BFC, weight_FD)


def _project_down_backward(residuals: Any, grad_BCD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn the weight itself: a product that reads it turned takes 1.3 times as long."""
    x_BFC, weight_FD = residuals
    turned_DF = jax.lax.optimization_barrier(weight_FD.T)
    return jnp.einsum("BCD,DF->BFC", grad_BCD, turned_DF), jnp.einsum("BFC,BCD->FD", x_BFC, grad_BCD)


project_down.defvjp(_project_down_forward, _project_down_backward)

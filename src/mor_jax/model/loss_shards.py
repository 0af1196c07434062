"""What the fused loss does between devices, so that nothing of the size of the head or the logits moves per chunk.

Each device loops over chunks of its own tokens with the width of the head gathered once before the loop and the
head's gradient summed once after it. Without an ambient mesh everything here is the identity. Letters: B T D V, a
device's share of each.
"""

from typing import Any

import jax

from mor_jax.mesh.axes import BATCH_AXES, axis_size

HIDDEN = ("batch", "sequence", None)
HEAD = ("vocab", "embed")
TOKENS = ("batch", "sequence")
SCALAR = ()


def _split(*axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device."""
    return tuple(axis for axis in axes if axis_size(axis) > 1)


def whole_width(head_VD: jax.Array) -> jax.Array:
    """Gather the width of the head, which `fsdp` splits."""
    return jax.lax.all_gather(head_VD, "fsdp", axis=1, tiled=True) if _split("fsdp") else head_VD


def sum_over_tokens(values: Any) -> Any:
    """Sum a tree over the devices that hold other tokens."""
    axes = _split(*BATCH_AXES, "context")
    return jax.lax.psum(values, axes) if axes else values


def sum_head_gradient(grad_BTD: jax.Array, grad_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum the head's gradient over the tokens of all devices; each keeps its share of the width.

    Returns:
        (``grad_BTD``, which goes on when the gathered head's gradient is cut: whole, it is float32; that gradient).
    """
    if _split("fsdp"):
        grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
        grad_BTD, grad_VD = jax.lax.optimization_barrier((grad_BTD, grad_VD))
    axes = _split(*(axis for axis in BATCH_AXES if axis != "fsdp"), "context")
    return grad_BTD, jax.lax.psum(grad_VD, axes) if axes else grad_VD

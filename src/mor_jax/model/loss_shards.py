"""What the fused loss does between devices, so that nothing of the size of the head or the logits moves per chunk.

Each device loops over chunks of its own tokens with the width of the head gathered once before the loop and the
head's gradient summed once after it. Over `tensor` each device holds a part of the vocabulary: a chunk exchanges three
float32 numbers per token (largest logit, sum of exponentials, target's logit), never logits. Without an ambient mesh
everything here is the identity. Letters: B T D V, a device's share of each.

References: Shoeybi et al., Megatron-LM (2019), section 3, for the loss over a split vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

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


def sum_head_gradient(grad_VD: jax.Array) -> jax.Array:
    """Sum the head's gradient over the tokens of all devices; each keeps its share of the width."""
    if _split("fsdp"):
        grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
    axes = _split(*(axis for axis in BATCH_AXES if axis != "fsdp"), "context")
    return jax.lax.psum(grad_VD, axes) if axes else grad_VD


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose logits this device computes."""

    size: int
    """V: entries of this part."""

    @property
    def is_whole(self) -> bool:
        """Whether there is no other part."""
        return not _split("tensor")

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the parts."""
        return jax.lax.psum(x, "tensor") if _split("tensor") else x

    def local(self, targets_BC: jax.Array) -> jax.Array:
        """Token ids counted from the part's first entry; outside 0..size-1 for other parts' tokens."""
        return targets_BC - jax.lax.axis_index("tensor") * self.size if _split("tensor") else targets_BC

    def logsumexp(self, logits_BCV: jax.Array) -> jax.Array:
        """Log-sum-exp over all parts, [B, C]."""
        if not _split("tensor"):
            return jax.nn.logsumexp(logits_BCV, axis=-1)
        largest_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), "tensor")
        return largest_BC + jnp.log(self.sum(jnp.sum(jnp.exp(logits_BCV - largest_BC[..., None]), axis=-1)))

    def pick(self, logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        """Logit of each target, whichever part holds it, [B, C]."""
        local_BC = self.local(targets_BC)
        picked_BC = jnp.take_along_axis(logits_BCV, jnp.clip(local_BC, 0, self.size - 1)[..., None], axis=-1)[..., 0]
        if not _split("tensor"):
            return picked_BC
        return self.sum(jnp.where((local_BC >= 0) & (local_BC < self.size), picked_BC, 0.0))

    def argmax(self, logits_BCV: jax.Array) -> jax.Array:
        """Token of the largest logit, the first of several, int32 [B, C]."""
        token_BC = jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)
        if not _split("tensor"):
            return token_BC
        largest_BC = jnp.max(logits_BCV, axis=-1)
        is_best_BC = largest_BC == jax.lax.pmax(largest_BC, "tensor")
        token_BC += jax.lax.axis_index("tensor") * self.size
        return jax.lax.pmin(jnp.where(is_best_BC, token_BC, jnp.iinfo(jnp.int32).max), "tensor")

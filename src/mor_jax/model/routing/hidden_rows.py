"""Selecting hidden states and putting them back when a mesh splits rows over `context`.

Scores, masks and indices are whole on every device of `context`, so the selection is the exact one of the whole row;
hidden states are split into equal shares of T tokens or C slots. A device holds its share of the slots after

- selecting: every device puts the selected rows that it holds into their slots and zeros elsewhere; the sum over
  devices, of which each keeps its share, has one term per slot and is exact (reduce-scatter of [B, C, D]);
- putting back: all slots are gathered, and every device reads those of its own rows (all-gather of [B, C, D]).

Each is the other's gradient. One move receives (n - 1) / n x B x C x D elements on each of n devices, whatever the
router selects: C / T of gathering all hidden states. Without `context` nothing moves. Letters: B T C D.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mor_jax.mesh.axes import axis_size, constrain, on_shards
from mor_jax.model.routing.select import Selection, gather_rows, masked_rows, merge_rows, take_rows

_HIDDEN = ("batch", "sequence", None)
_WHOLE = ("batch", None)


def even_slots(count: int, multiple: int = 1, length: int | None = None) -> int:
    """Slots that seat `count` tokens in equal shares over `context`; those beyond hold no selected token.

    They are a multiple of `multiple` too, which kernels like, unless that exceeds the row's `length`.
    """
    shards = axis_size("context")
    step = math.lcm(shards, multiple)
    slots = -(-count // step) * step
    return slots if length is None or slots <= length else -(-count // shards) * shards


def whole(scores_BT: jax.Array) -> jax.Array:
    """Hold scores or gates [B, T] whole on every device of `context`."""
    return constrain(scores_BT, "batch", None)


def gather_hidden(x_BTD: jax.Array, selection: Selection) -> jax.Array:
    """Return the hidden states of the selected rows, [B, C, D]; C is a multiple of the size of `context`."""
    if axis_size("context") == 1:
        return constrain(gather_rows(x_BTD, selection), "batch", "sequence", None)
    return _gather(x_BTD, selection)


def merge_hidden(y_BCD: jax.Array, x_BTD: jax.Array, selection: Selection) -> jax.Array:
    """Return x with its selected rows replaced by y's."""
    if axis_size("context") == 1:
        return constrain(merge_rows(y_BCD, x_BTD, selection), "batch", "sequence", None)
    return _scatter(y_BCD, selection) + masked_rows(~selection.mask_BT, x_BTD)


def _gather_shards(x_BTD: jax.Array, selection: Selection) -> jax.Array:
    def local(x_BTD: jax.Array, index_BC: jax.Array) -> jax.Array:
        index_BC = index_BC - jax.lax.axis_index("context") * x_BTD.shape[1]
        held_BC1 = ((index_BC >= 0) & (index_BC < x_BTD.shape[1]))[:, :, None]
        y_BCD = jnp.where(held_BC1, take_rows(x_BTD, index_BC), jnp.zeros((), x_BTD.dtype))
        return jax.lax.psum_scatter(y_BCD, "context", scatter_dimension=1, tiled=True)

    return on_shards(local, (_HIDDEN, _WHOLE), _HIDDEN)(x_BTD, selection.index_BC)


def _scatter_shards(y_BCD: jax.Array, selection: Selection) -> jax.Array:
    share = selection.mask_BT.shape[1] // axis_size("context")

    def local(y_BCD: jax.Array, mask_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
        y_BCD = jax.lax.all_gather(y_BCD, "context", axis=1, tiled=True)
        own = functools.partial(
            jax.lax.dynamic_slice_in_dim,
            start_index=jax.lax.axis_index("context") * share,
            slice_size=share,
            axis=1,
        )
        return jnp.where(own(mask_BT)[:, :, None], take_rows(y_BCD, own(slot_BT)), jnp.zeros((), y_BCD.dtype))

    return on_shards(local, (_HIDDEN, _WHOLE, _WHOLE), _HIDDEN)(y_BCD, selection.mask_BT, selection.slot_BT)


def _gather_backward(selection: Selection, grad_BCD: jax.Array) -> tuple[jax.Array, None]:
    return _scatter_shards(grad_BCD, selection), None


def _scatter_backward(selection: Selection, grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    return _gather_shards(masked_rows(selection.mask_BT, grad_BTD), selection), None


_gather = jax.custom_vjp(_gather_shards)
_gather.defvjp(lambda x_BTD, selection: (_gather_shards(x_BTD, selection), selection), _gather_backward)
_scatter = jax.custom_vjp(_scatter_shards)
_scatter.defvjp(lambda y_BCD, selection: (_scatter_shards(y_BCD, selection), selection), _scatter_backward)

"""Selecting rows of a sequence and putting them back, with gathers only in both directions of differentiation.

A scatter's gradient is a gather and a gather's gradient a scatter; scatters are slow to compile and move several times
the bytes. Knowing each selected row's slot (its rank), both directions can read instead of write.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.mesh.axes import on_shards
from mor_jax.model.routing.ranks import kth_highest, ordered

_ROWS: Any = ("batch", None)


@struct.dataclass
class Selection:
    """Rows of [B, T, ...] chosen into [B, C, ...], in ascending order."""

    index_BC: jax.Array
    """int32: row that each slot holds; slots beyond a row's count hold rows that are not selected."""
    mask_BT: jax.Array
    """bool: whether a row is selected."""
    slot_BT: jax.Array
    """int32: slot of each selected row; arbitrary but in range for others."""


@jax.named_scope("routing")
def select_mask(mask_BT: jax.Array, capacity: int, slots: int | None = None) -> Selection:
    """Choose the rows where `mask_BT` holds, at most `capacity` per batch entry: the earliest keep their seats.

    `slots` (default `capacity`) is the length of the result; those beyond `capacity` stay empty.
    """

    def local(mask_BT: jax.Array) -> Selection:
        kept_BT = mask_BT & (jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) <= capacity)
        return _selection(kept_BT, capacity if slots is None else slots)

    return _per_row(local)(mask_BT)


@jax.named_scope("routing")
def select_top(scores_BT: jax.Array, count: int, slots: int | None = None) -> Selection:
    """Choose the `count` rows of highest float32 score, ties to the earlier row; `slots` as in `select_mask`."""

    def local(scores_BT: jax.Array) -> Selection:
        return _selection(_highest(scores_BT, count), count if slots is None else slots)

    return _per_row(local)(scores_BT)


@jax.named_scope("routing")
def top_mask(scores_BT: jax.Array, count: jax.Array) -> jax.Array:
    """bool [B, T]: the rows that `select_top` would choose, for a traced int32 `count`."""
    return on_shards(_highest, (_ROWS, ()), _ROWS)(scores_BT, count)


def _highest(scores_BT: jax.Array, count: int | jax.Array) -> jax.Array:
    """bool [B, T]: the `count` highest scores of every row, ties to the earlier; without a sort (see ``ranks``)."""
    keys_BT = ordered(jnp.where(scores_BT == 0, 0.0, scores_BT))  # -0.0 and 0.0 tie
    lowest_B1 = kth_highest(keys_BT, count, axis=1)
    above_BT, ties_BT = keys_BT > lowest_B1, keys_BT == lowest_B1
    missing_B1 = count - jnp.sum(above_BT, axis=1, keepdims=True, dtype=jnp.int32)
    return above_BT | (ties_BT & (jnp.cumsum(ties_BT, axis=1, dtype=jnp.int32) <= missing_B1))


def _selection(mask_BT: jax.Array, slots: int) -> Selection:
    """The rows of a mask in `slots` slots; those that are left over hold the earliest rows that it leaves out.

    The row of slot k is how many rows come before it, which counting finds without a sort.
    """
    seated_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32)
    left_BT = jnp.arange(1, mask_BT.shape[1] + 1)[None] - seated_BT
    seated_B11 = seated_BT[:, -1, None, None]
    slot_1C1 = jnp.arange(slots)[None, :, None]
    rank_BCT = jnp.where(slot_1C1 < seated_B11, seated_BT[:, None], seated_B11 + left_BT[:, None])
    index_BC = jnp.sum(rank_BCT <= slot_1C1, axis=2, dtype=jnp.int32)
    return Selection(index_BC=index_BC, mask_BT=mask_BT, slot_BT=jnp.clip(seated_BT - 1, 0, slots - 1))


def _per_row(local: Callable[[jax.Array], Selection]) -> Callable[[jax.Array], Selection]:
    """Run on the rows that a device has: left alone, the partitioner gathers the operands of top-k and scatter."""
    return on_shards(local, (_ROWS,), Selection(index_BC=_ROWS, mask_BT=_ROWS, slot_BT=_ROWS))


@jax.named_scope("routing")
def take_rows(x_BTX: jax.Array, index_BC: jax.Array) -> jax.Array:
    """Return rows of [B, T, ...] by int32 index, [B, C, ...]; not meant to be differentiated."""
    index = index_BC.reshape(index_BC.shape + (1,) * (x_BTX.ndim - 2))
    return jnp.take_along_axis(x_BTX, index, axis=1, mode="clip")


def masked_rows(mask_BT: jax.Array, x_BTX: jax.Array) -> jax.Array:
    """Return x with zeros where the mask does not hold."""
    mask = mask_BT.reshape(mask_BT.shape + (1,) * (x_BTX.ndim - 2))
    return jnp.where(mask, x_BTX, jnp.zeros((), x_BTX.dtype))


@jax.custom_vjp
@jax.named_scope("routing")
def gather_rows(x_BTX: jax.Array, selection: Selection) -> jax.Array:
    """Return the selected rows, [B, C, ...]. Slots that hold no selected row must not reach the loss."""
    return take_rows(x_BTX, selection.index_BC)


def _gather_forward(x_BTX: jax.Array, selection: Selection) -> tuple[jax.Array, Selection]:
    return gather_rows(x_BTX, selection), selection


@jax.named_scope("routing")
def _gather_backward(selection: Selection, grad_BCX: jax.Array) -> tuple[jax.Array, None]:
    return scatter_rows(grad_BCX, selection), None


@jax.custom_vjp
@jax.named_scope("routing")
def scatter_rows(y_BCX: jax.Array, selection: Selection) -> jax.Array:
    """Return [B, T, ...] with the selected rows in place and zeros elsewhere."""
    return masked_rows(selection.mask_BT, take_rows(y_BCX, selection.slot_BT))


def _scatter_forward(y_BCX: jax.Array, selection: Selection) -> tuple[jax.Array, Selection]:
    return scatter_rows(y_BCX, selection), selection


@jax.named_scope("routing")
def _scatter_backward(selection: Selection, grad_BTX: jax.Array) -> tuple[jax.Array, None]:
    return take_rows(masked_rows(selection.mask_BT, grad_BTX), selection.index_BC), None


gather_rows.defvjp(_gather_forward, _gather_backward)
scatter_rows.defvjp(_scatter_forward, _scatter_backward)


@jax.named_scope("routing")
def merge_rows(y_BCX: jax.Array, x_BTX: jax.Array, selection: Selection) -> jax.Array:
    """Return x with its selected rows replaced by y's."""
    return scatter_rows(y_BCX, selection) + masked_rows(~selection.mask_BT, x_BTX)

"""What a layer is told beside its input: which tokens it computes, which keys they may attend to, and where from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.mesh.axes import constrain
from mor_jax.model.layers import Rotary
from mor_jax.model.routing.select import Selection, take_rows

KeyValue = tuple[jax.Array, jax.Array]


@struct.dataclass
class TokenView:
    """Which tokens of each row a [B, C, ...] tensor holds, in ascending order of row index; whole under `context`."""

    rows_BC: jax.Array
    """int32 index in the row: what causality compares."""
    positions_BC: jax.Array
    """int32 position: what rotary embedding rotates by (restarts at every document)."""
    segments_BC: jax.Array | None = None
    """int32 document number: attention stays inside one; None attends across."""
    valid_BC: jax.Array | None = None
    """bool: whether the token may be attended to; None is all."""

    def take(self, selection: Selection) -> "TokenView":
        """The view of the selected tokens."""
        return jax.tree.map(lambda a_BT: constrain(take_rows(a_BT, selection.index_BC), "batch", None), self)


@struct.dataclass
class LayerContext:
    """What every layer of one pass over the block shares."""

    queries: TokenView
    """The tokens that the layer computes."""
    rotary: Rotary
    """Tables at the queries' positions."""
    keys: TokenView | None = None
    """Rows of the cached keys and values; None attends among the queries themselves."""
    update: Selection | None = None
    """Cached rows that are replaced by fresh keys and values of the queries (compact queries)."""
    fresh_BS: jax.Array | None = None
    """bool: cached rows that are replaced by fresh ones (full-length queries)."""
    keep_kv: bool = struct.field(pytree_node=False, default=False)
    """Whether the layer returns its keys and values for later recursions."""
    observe: Callable[[jax.Array, jax.Array], None] | None = struct.field(pytree_node=False, default=None)
    """Analysis: called with the rotated queries and keys of a layer that is not in a loop; None is nobody."""


def attention_mask(queries: TokenView, keys: TokenView | None, *, explicit: bool = False) -> jax.Array | None:
    """bool [B, 1, T, S]: key row <= query row, same segment, key valid; None if causality among the queries is all,
    unless it is to be `explicit`.

    Among the queries themselves slots are compared, not rows: they ascend alike, and slots without a token stand last.
    """
    if not explicit and keys is None and queries.segments_BC is None and queries.valid_BC is None:
        return None
    if keys is None:
        keys = queries
        slots_T = jnp.arange(queries.rows_BC.shape[1])
        mask_BTS = jnp.broadcast_to(
            slots_T[None, None, :] <= slots_T[None, :, None], (*queries.rows_BC.shape, slots_T.size)
        )
    else:
        mask_BTS = keys.rows_BC[:, None, :] <= queries.rows_BC[:, :, None]
    if queries.segments_BC is not None and keys.segments_BC is not None:
        mask_BTS &= keys.segments_BC[:, None, :] == queries.segments_BC[:, :, None]
    if keys.valid_BC is not None:
        mask_BTS &= keys.valid_BC[:, None, :]
    return constrain(mask_BTS, "batch", "sequence", None)[:, None]

"""What a layer is told beside its input: which tokens it computes, which keys they may attend to, and where from."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.rotary import Rotary
from mor_jax.mesh.axes import constrain
from mor_jax.model.routing.select import Selection, take_rows


class KeyValueStore(Protocol):
    """Keys and values that outlive a call, as decoding keeps them (``mor_jax.infer``)."""

    @property
    def writes(self) -> bool:
        """Whether the layer projects new keys and values for it."""
        ...

    @property
    def shards(self) -> int:
        """Devices that share the heads; see ``split_last_heads``."""
        ...

    def attend(self, projected_BTMH: jax.Array, cached: Any, rotary: Rotary) -> tuple[jax.Array, Any]:
        """Append to one layer's ``cached`` arrays and attend to them: (output [B, T, N, H], the arrays).

        ``projected_BTMH`` holds N queries and, if the store writes, K keys and K values, none of them rotated.
        """
        ...


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
    store: KeyValueStore | None = None
    """Decoding: reads and writes what ``cached`` then is, one layer's share of a cache; other fields rest."""
    keep_kv: bool = struct.field(pytree_node=False, default=False)
    """Whether the layer returns its keys and values for later recursions."""
    observe: Callable[[jax.Array, jax.Array], None] | None = struct.field(pytree_node=False, default=None)
    """Analysis: called with the rotated queries and keys of a layer that is not in a loop; None is nobody."""

    @property
    def mask(self) -> Mask:
        """Which keys the queries see."""
        return Mask(self.queries, self.keys)


def take_tokens(view: TokenView, selection: Selection) -> TokenView:
    """The view of the selected tokens."""
    return jax.tree.map(lambda a_BT: constrain(take_rows(a_BT, selection.index_BC), "batch", None), view)

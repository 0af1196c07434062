"""A layer's input, and what it is told beside it: tokens to compute, keys they may attend to, and where from."""

from collections.abc import Callable

import jax
from flax import struct

from mor_jax.array_types import RotaryRows
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.norm import square_sums
from mor_jax.kernels.rotary import Rotary
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.devices import target_platform
from mor_jax.model.routing.select import Selection, take_rows


@struct.dataclass
class Stream:
    """The residual stream between two layers."""

    x_BCD: jax.Array
    squares_BC: jax.Array | None = None
    """``square_sums`` of x, made by the product that ends a layer; None lets the next layer's first norm make them."""

    @classmethod
    def enter(cls, x_BCD: jax.Array) -> "Stream":
        """Begin a loop of layers; on a TPU the sums go along, since the next round would read x once more for them."""
        return cls(x_BCD, square_sums(x_BCD) if target_platform() == "tpu" else None)


@struct.dataclass
class LayerContext:
    """What every layer of one pass over the block shares."""

    queries: TokenView
    """The tokens that the layer computes."""
    rotary: Rotary
    """Tables at the queries' positions."""
    rotary_rows: RotaryRows
    """Of queries and of the keys that they attend to, for a kernel that rotates."""
    keys: TokenView | None = None
    """Rows of the cached keys and values; None attends among the queries themselves."""
    update: Selection | None = None
    """Cached rows that are replaced by fresh keys and values of the queries (compact queries)."""
    fresh_BS: jax.Array | None = None
    """bool: cached rows that are replaced by fresh ones (full-length queries)."""
    keep_kv: bool = struct.field(pytree_node=False, default=False)
    """Whether the layer returns its keys and values for later recursions."""
    first_values_BCX: jax.Array | None = None
    """The first layer's values of the queries, if ``PartsConfig.value_residual`` is on."""
    observe: Callable[[jax.Array, jax.Array], None] | None = struct.field(pytree_node=False, default=None)
    """Analysis: called with the rotated queries and keys of a layer that is not in a loop; None is nobody."""

    @property
    def mask(self) -> Mask:
        """Which keys the queries see."""
        return Mask(self.queries, self.keys)


def take_tokens(view: TokenView, selection: Selection) -> TokenView:
    """The view of the selected tokens."""
    return jax.tree.map(lambda a_BT: constrain(take_rows(a_BT, selection.index_BC), "batch", None), view)

"""Named array types of public boundaries, and the letters that shapes are written with.

B batch, T query positions, S key positions, D model, F feed-forward, N query heads, K key/value heads, G = N / K,
H head width, V vocabulary, R recursions, L layers in the shared block, C routed capacity (tokens of one recursion).
Local names carry their axes: ``x_BTD``, ``keys_BSKH``, ``index_BC``.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Segments = Int[Array, "B T"]
TokenMask = Bool[Array, "B T"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
RowIndex = Int[Array, "B C"]
Params = Mapping[str, Any]
KeyValue = tuple[Array, Array]
"""Keys and values of one layer."""

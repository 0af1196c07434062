"""What the trunk is given: rows of tokens, and what is known of each token (letters: B rows, T positions)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.mesh.axes import constrain
from mor_jax.model.layer_context import TokenView


@struct.dataclass
class Rows:
    """Rows of tokens, arrays [B, T] (numpy ones will do)."""

    tokens_BT: jax.Array
    """int32 token ids."""
    positions_BT: jax.Array | None = None
    """int32 places in the documents, which ``rotary_positions='document'`` uses; None is one document per row."""
    segment_ids_BT: jax.Array | None = None
    """int32 document numbers from 1; 0 is padding, which stands last in its row, takes no seat and counts nowhere.
    Attention respects them unless ``attend_across_documents``. None is one document per row."""
    attention_mask_BT: jax.Array | None = None
    """Nonzero or true where a token may be attended to; the others route like any (as released). None is all."""

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> "Rows":
        """Make the inputs of a packed batch, arrays [B, T+1]: the last token of each row is a target only."""
        tokens, positions, segments = (batch[name][:, :-1] for name in ("tokens", "positions", "segment_ids"))
        return cls(tokens, positions, segments)

    @property
    def counted_BT(self) -> jax.Array:
        """bool: tokens that are not padding; only these compete and count."""
        if self.segment_ids_BT is None:
            return jnp.ones(self.tokens_BT.shape, bool)
        return self.segment_ids_BT > 0

    def view(self, config: ModelConfig) -> TokenView:
        """All tokens, as attention sees them; the one place that chooses rotary positions."""
        rows_BT = jnp.broadcast_to(jnp.arange(self.tokens_BT.shape[1], dtype=jnp.int32)[None], self.tokens_BT.shape)
        rows_BT = constrain(rows_BT, "batch", None)
        restarted_BT = self.positions_BT if config.rotary_positions == "document" else None
        mask_BT = self.attention_mask_BT
        return TokenView(
            rows_BC=rows_BT,
            positions_BC=rows_BT if restarted_BT is None else restarted_BT,
            segments_BC=None if config.attend_across_documents else self.segment_ids_BT,
            valid_BC=None if mask_BT is None else mask_BT.astype(bool),
        )

"""Which keys a query sees, and the forms in which the attention kernels take it (B batch, T queries, S keys)."""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.mesh.axes import constrain

NEVER = 2**30
"""First key of queries that do not exist: 0 would make their block read all keys from the first."""


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


@struct.dataclass
class Mask:
    """A query sees the keys up to its own row, of its document, that are valid.

    Among the queries themselves slots are compared, not rows: they ascend alike, and slots without a token stand last.
    """

    queries: TokenView
    keys: TokenView | None = None
    """The keys' tokens; None when they are the queries' own."""

    @property
    def is_causal(self) -> bool:
        """Whether causality among the queries is all."""
        return self.keys is None and self.queries.segments_BC is None and self.queries.valid_BC is None

    @property
    def is_runs(self) -> bool:
        """Whether every query sees one run of keys: documents are contiguous, but tokens may be invalid anywhere."""
        return self.queries.valid_BC is None and (self.keys is None or self.keys.valid_BC is None)

    @property
    def kind(self) -> str:
        """In words, for the log."""
        if not self.is_runs:
            return "with an attention mask"
        if self.keys is not None:
            return "queries over shared keys"
        return "causal" if self.is_causal else "causal within documents"

    def dense(self) -> jax.Array:
        """bool [B, 1, T, S]."""
        queries, keys = self.queries, self.queries if self.keys is None else self.keys
        if self.keys is None:
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

    def runs(self) -> tuple[jax.Array | None, jax.Array | None]:
        """The keys ``start <= s < end`` of every query where that is all (``is_runs``); shared keys are rows 0..S-1.

        Returns:
            (start, end), int32 [B, T]; start None is 0, both None is plain causality.
        """
        if self.is_causal:
            return None, None
        shape = self.queries.rows_BC.shape
        rows_BT = None if self.keys is None else self.queries.rows_BC
        last_BT = jnp.arange(shape[1], dtype=jnp.int32)[None] if rows_BT is None else rows_BT
        segments_BS = (self.queries if self.keys is None else self.keys).segments_BC
        end_BT = jnp.broadcast_to(last_BT + 1, shape)
        if self.queries.segments_BC is None or segments_BS is None:
            return None, end_BT
        index_BS = jnp.broadcast_to(jnp.arange(segments_BS.shape[1], dtype=jnp.int32)[None], segments_BS.shape)
        opens_BS = jnp.pad(segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        start_BS = jax.lax.cummax(jnp.where(opens_BS, index_BS, 0), axis=1)
        if rows_BT is None:
            return start_BS, end_BT
        return jnp.take_along_axis(start_BS, rows_BT, axis=1, mode="clip"), end_BT

    def bounds(self) -> jax.Array:
        """``runs`` as one array int32 [B, 2, T], first key above the one past the last.

        Tokens that are not valid stay in the run: a kernel that takes bounds masks them by itself.
        """
        start_BT, end_BT = self.runs()
        if end_BT is None:
            slots_T = jnp.arange(1, self.queries.rows_BC.shape[1] + 1, dtype=jnp.int32)
            end_BT = jnp.broadcast_to(slots_T[None], self.queries.rows_BC.shape)
        return jnp.stack([jnp.zeros_like(end_BT) if start_BT is None else start_BT, end_BT], axis=1)

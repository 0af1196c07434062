"""Which keys a query sees where its keys are one run: what the attention kernels of GPUs take for a mask (B T S)."""

import jax
import jax.numpy as jnp

NEVER = 2**30
"""First key of queries that do not exist: 0 would make their block read all keys from the first."""


def visible_runs(
    rows_BT: jax.Array | None, segments_BT: jax.Array | None, key_segments_BS: jax.Array | None, length: int
) -> tuple[jax.Array | None, jax.Array]:
    """Describe "key row <= query row, same document" as one run of keys per query.

    Documents must be contiguous in their rows, as packing makes them.

    Args:
        rows_BT: int32 row of each query among the keys' rows 0..S-1; None when the queries are the keys themselves, and
            slots are compared.
        segments_BT: int32 document of each query; None attends across.
        key_segments_BS: int32 document of each key; the queries' own if ``rows_BT`` is None.
        length: number of queries.

    Returns:
        (start, end) for ``flash_attention``, end int32 [1, T] or [B, T].
    """
    last_BT = jnp.arange(length, dtype=jnp.int32)[None] if rows_BT is None else rows_BT
    keys_BS = segments_BT if rows_BT is None else key_segments_BS
    if segments_BT is None or keys_BS is None:
        return None, last_BT + 1
    index_BS = jnp.broadcast_to(jnp.arange(keys_BS.shape[1], dtype=jnp.int32)[None], keys_BS.shape)
    opens_BS = jnp.pad(keys_BS[:, 1:] != keys_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start_BS = jax.lax.cummax(jnp.where(opens_BS, index_BS, 0), axis=1)
    if rows_BT is None:
        return start_BS, last_BT + 1
    return jnp.take_along_axis(start_BS, rows_BT, axis=1, mode="clip"), last_BT + 1

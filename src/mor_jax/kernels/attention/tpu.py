"""Splash attention on TPU for queries at run-time rows: jax's kernel, driven by tables made from the routing.

One path serves causal attention (queries at rows 0..T-1) and recursive key/value sharing (selected queries over all
keys up to their own row, paper section 2.2.2). The batch is folded into the sequence axis, so that one kernel call does
all rows, and tables of the blocks of keys that each block of queries can see are computed on the fly: blocks of the
future, of other batch entries and of other documents are neither read nor multiplied.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head dim, I blocks of queries, J of keys.

References:
    The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`; its stock masks are static, these are not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from mor_jax.kernels.padding import pad_axis
from mor_jax.mesh.axes import axis_size, on_shards

_LANES = 128
"""Width of the vector registers: every block of the kernel is a multiple of it."""
_HIDDEN = -1
"""Segment of keys that nothing sees; row of queries that see nothing."""


def takes(head_dim: int) -> bool:
    """Whether the kernel takes heads of such a width."""
    return head_dim % 64 == 0


def block_size(length: int) -> int:
    """Block that a length is padded to and cut by: large blocks, since every step of the kernel's grid has a cost.

    At most a third of a padded length is padding; 1365 selected tokens become 3 x 512, 682 become 3 x 256.
    """
    return 512 if length >= 1024 else 256 if length >= 512 else _LANES


def splash_attention(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    rows_BT: jax.Array,
    segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of every query over the keys up to its row and of its segment, each device on its own share.

    Scores are scaled by H^-0.5 and computed in float32. Lengths are padded to whole blocks here.

    Args:
        query_BTNH: queries; head n reads key/value head n // (N / K).
        keys_BSKH: keys, whole rows on every device that holds a part of the queries.
        values_BSKH: values.
        rows_BT: int32 row of each query among the keys 0..S-1. Skipping works best when they ascend; nothing else needs
            it.
        segments_BT: int32 document of each query, not negative; None attends across.
        key_segments_BS: int32 document of each key, negative for keys that nothing may see; None like
            ``segments_BT``.
        interpret: run in Pallas' interpreter, on any device, for tests.

    Returns:
        [B, T, N, H] in the queries' dtype; an arbitrary finite value for a query without visible keys.
    """
    length = query_BTNH.shape[1]
    shards = axis_size("context")
    block_q, block_k = block_size(-(-length // shards)), block_size(keys_BSKH.shape[1])
    query_BTNH = pad_axis(query_BTNH, 1, block_q * shards)
    rows_BT = pad_axis(rows_BT, 1, block_q * shards, _HIDDEN)
    keys_BSKH, values_BSKH = pad_axis(keys_BSKH, 1, block_k), pad_axis(values_BSKH, 1, block_k)
    segments = None
    if segments_BT is not None and key_segments_BS is not None:
        segments = (pad_axis(segments_BT, 1, block_q * shards), pad_axis(key_segments_BS, 1, block_k, _HIDDEN))
    tokens = ("batch", "sequence")
    key_value = ("batch", None, "kv_heads", "head_dim")
    in_axes = ((*tokens, "heads", "head_dim"), key_value, key_value, tokens)
    in_axes = (*in_axes, None if segments is None else (tokens, ("batch", None)))
    local = functools.partial(_on_one_device, blocks=(block_q, block_k), interpret=interpret)
    attention = on_shards(local, in_axes, (*tokens, "heads", "head_dim"))
    return attention(query_BTNH, keys_BSKH, values_BSKH, rows_BT, segments)[:, :length]


def _on_one_device(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    rows_BT: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    blocks: tuple[int, int],
    interpret: bool,
) -> jax.Array:
    batch, length, heads, width = query_BTNH.shape
    visible_BIJ = visible_blocks(rows_BT, segments, keys_BSKH.shape[1], blocks)
    by_query, by_key = _tables(visible_BIJ)
    # batch entry b owns the folded keys b * S ..; blocks of other entries are never visited, so this row is mask enough
    offset_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None] * keys_BSKH.shape[1]
    folded_rows = (rows_BT + offset_B1).reshape(-1)
    kernel = _kernel(_mask_info(by_query, folded_rows), _mask_info(by_key, folded_rows), blocks, interpret)
    scaled_BTNH = query_BTNH * jnp.asarray(width**-0.5, query_BTNH.dtype)
    ids = None if segments is None else splash.SegmentIds(*(x.reshape(-1) for x in segments))
    out = kernel(_fold(scaled_BTNH), _fold(keys_BSKH), _fold(values_BSKH), segment_ids=ids)
    return out.reshape(heads, batch, length, width).transpose(1, 2, 0, 3)


def _fold(x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [N, B * T, H], the kernel's layout."""
    return x_BTNH.transpose(2, 0, 1, 3).reshape(x_BTNH.shape[2], -1, x_BTNH.shape[3])


def visible_blocks(
    rows_BT: jax.Array, segments: tuple[jax.Array, jax.Array] | None, keys: int, blocks: tuple[int, int]
) -> jax.Array:
    """Say which blocks of keys a block of queries may see anything of; may say yes in vain, never no in vain.

    A block of queries without any visible key is given its first block of keys, since the kernel divides by the sum of
    what it has visited.

    Args:
        rows_BT: int32 row of each query; negative sees nothing.
        segments: int32 documents of queries [B, T] and keys [B, S]; None attends across.
        keys: S.
        blocks: queries and keys per block.

    Returns:
        bool [B, I, J].
    """
    block_q, block_k = blocks
    last_BI = jnp.max(_blocked(rows_BT, block_q), axis=2)
    first_key_J = jnp.arange(keys // block_k) * block_k
    visible_BIJ = first_key_J[None, None, :] <= last_BI[:, :, None]
    if segments is not None:  # ranges of documents that do not meet have no document in common
        queries_BIq, keys_BJk = _blocked(segments[0], block_q), _blocked(segments[1], block_k)
        visible_BIJ &= jnp.min(queries_BIq, axis=2)[:, :, None] <= jnp.max(keys_BJk, axis=2)[:, None, :]
        visible_BIJ &= jnp.min(keys_BJk, axis=2)[:, None, :] <= jnp.max(queries_BIq, axis=2)[:, :, None]
    blind_BI1 = ~jnp.any(visible_BIJ, axis=2, keepdims=True)
    return visible_BIJ | (blind_BI1 & (first_key_J == 0)[None, None, :])


def _blocked(x_BT: jax.Array, block: int) -> jax.Array:
    return x_BT.reshape(x_BT.shape[0], -1, block)


def _tables(visible_BIJ: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """(blocks to fetch, whether to compute) of the folded arrays, for the grid by queries and for the grid by keys.

    Where nothing is computed the nearest visible block is named again, so that nothing new is fetched.
    """
    batch, blocks_q, blocks_k = visible_BIJ.shape
    base_B11 = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    key_BIJ = _nearest(visible_BIJ, 2) + base_B11 * blocks_k
    query_BIJ = _nearest(visible_BIJ, 1) + base_B11 * blocks_q
    run_BIJ = visible_BIJ.astype(jnp.int32)
    by_query = tuple(x.reshape(1, batch * blocks_q, blocks_k) for x in (key_BIJ, run_BIJ))
    by_key = tuple(x.transpose(1, 0, 2).reshape(1, blocks_q, batch * blocks_k) for x in (query_BIJ, run_BIJ))
    return by_query, by_key


def _nearest(visible_BIJ: jax.Array, axis: int) -> jax.Array:
    """Index along an axis, clipped to between its first and its last visible block."""
    size = visible_BIJ.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, visible_BIJ.shape, axis)
    first = jnp.min(jnp.where(visible_BIJ, index, size - 1), axis=axis, keepdims=True)
    last = jnp.max(jnp.where(visible_BIJ, index, 0), axis=axis, keepdims=True)
    return jnp.clip(index, first, jnp.maximum(first, last))


def _mask_info(tables: tuple[jax.Array, ...], folded_rows: jax.Array) -> MaskInfo:
    data_next, block_mask = tables
    fields: dict[str, Any] = {  # annotated as numpy arrays, which is what the stock masks are made of
        "data_next": data_next,
        "mask_next": None,
        "block_mask": block_mask,
        "partial_mask_blocks": None,
        "q_sequence": folded_rows,
    }
    return MaskInfo(**fields)


def _causal(rows: jax.Array, keys: jax.Array) -> jax.Array:
    return rows >= keys


def _kernel(by_query: MaskInfo, by_key: MaskInfo, blocks: tuple[int, int], interpret: bool) -> Any:
    block_q, block_k = blocks
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    return splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_causal,
        interpret=interpret,
    )

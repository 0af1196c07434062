"""Grouped-query attention over a description of its mask: causal by row, within segments (letters: B T S N K H)."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from mor_jax.axes import axis_size, constrain, on_shards
from mor_jax.config import AttentionBackend, ModelConfig, PerfConfig
from mor_jax.errors import require
from mor_jax.model import attention_tokamax
from mor_jax.model.attention_gpu import flash_attention, visible_runs
from mor_jax.model.attention_tpu import resolve_tpu_backend, splash_attention, target_platform
from mor_jax.model.layers import Rotary, apply_rotary, compute_weight, normal_init
from mor_jax.model.relaxation import low_rank
from mor_jax.model.rows import Selection, merge_rows, take_rows

logger = logging.getLogger(__name__)
KeyValue = tuple[jax.Array, jax.Array]
_CUDNN_BLOCK = 128
JOINT_PROJECTION = "query_key_value"
"""Decoding: parameter [D, N + 2K, H] that holds `query` and `key_value` side by side."""


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


def split_last_heads(joint: jax.Array, count: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Split the last ``count`` heads off a joint projection: (the others, these).

    Args:
        joint: [..., heads, head dim]. It holds queries, keys and values shard by shard, so that every device has those
            that belong together, and the split moves nothing.
        count: heads to split off, over all shards.
        shards: devices that share the heads.
    """
    *lead, heads, head_dim = joint.shape
    by_shard = joint.reshape(*lead, shards, heads // shards, head_dim)
    parts = jnp.split(by_shard, [(heads - count) // shards], axis=-2)
    rest, last = (part.reshape(*lead, -1, head_dim) for part in parts)
    return rest, last


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


def resolve_backend(
    backend: AttentionBackend, dtype: str, head_dim: int, devices: int | None = None
) -> AttentionBackend:
    """Choose the attention kernel for the device that the program is traced for; ``resolve_tpu_backend`` on a TPU.

    Raises:
        UserError: a backend was asked for where it cannot run.
    """
    if target_platform() == "tpu":
        return resolve_tpu_backend(backend, dtype, head_dim)
    require(backend != "splash", f"perf.attention_backend='splash' needs a TPU, not device={target_platform()!r}")
    return _resolve_backend(backend, dtype, head_dim, devices)


@functools.cache
def _resolve_backend(
    backend: AttentionBackend, dtype: str, head_dim: int, devices: int | None = None
) -> AttentionBackend:
    """Choose the attention kernel for this process's device, and log it once.

    `xla` runs everywhere and holds the [T, S] scores in memory. `cudnn` needs a GPU, bfloat16 and a head_dim that is a
    multiple of 8 up to 256. `triton` (this project's kernel for packed rows and shared keys, cuDNN for plain causality)
    and `tokamax` (tokamax's for causality, this project's for shared keys) run on one device and need a head_dim that
    is a power of two.

    Args:
        backend: asked for.
        dtype: of the model.
        head_dim: of the model.
        devices: of the mesh; None takes the process's view of all.

    Raises:
        UserError: a backend was asked for where it cannot run.
    """
    on_gpu = jax.default_backend() == "gpu" and dtype == "bfloat16"
    fits = on_gpu and head_dim % 8 == 0 and head_dim <= 256
    fits_triton = fits and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    for name, possible, rule in (
        ("cudnn", fits, "head_dim a multiple of 8 up to 256"),
        ("triton", fits_triton, "head_dim a power of two from 16 to 256"),
        ("tokamax", fits_triton and attention_tokamax.is_available(), "head_dim 64 or more, and tokamax on Hopper"),
    ):
        require(
            backend != name or possible,
            f"perf.attention_backend={name!r} needs a GPU, dtype='bfloat16' and {rule}, not "
            f"device={jax.default_backend()!r}, dtype={dtype!r}, head_dim={head_dim}",
        )
    alone = (jax.device_count() if devices is None else devices) == 1
    automatic: AttentionBackend = ("triton" if fits_triton and alone else "cudnn") if fits else "xla"
    chosen: AttentionBackend = automatic if backend == "auto" else backend
    logger.info("attention backend: %s (asked for %s)", chosen, backend)
    return chosen


def _pad_length(x: jax.Array, axis: int, value: float | bool = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _CUDNN_BLOCK)
    return jnp.pad(x, widths, constant_values=value)


def _cudnn(query_BTNH: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Padded where cuDNN needs it: to even lengths (JAX's rule in training), or to its block when it takes a mask."""
    if mask is None and query_BTNH.shape[1] % 2 == 0:
        return jax.nn.dot_product_attention(query_BTNH, keys, values, is_causal=True, implementation="cudnn")
    length = query_BTNH.shape[1]
    query_BTNH, keys, values = (_pad_length(x, 1) for x in (query_BTNH, keys, values))
    if mask is not None:
        mask = _pad_length(_pad_length(mask, 3, False), 2, True)
    out_BTNH = jax.nn.dot_product_attention(
        query_BTNH, keys, values, mask=mask, is_causal=mask is None, implementation="cudnn"
    )
    return out_BTNH[:, :length]


def _splash(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, queries: TokenView, keys: TokenView | None
) -> jax.Array:
    """The mask of ``attention_mask`` as the TPU kernel takes it: a row per query, and documents."""
    rows_BT, seen = queries.rows_BC, queries if keys is None else keys
    if keys is None:  # slots, not rows
        rows_BT = jnp.broadcast_to(jnp.arange(rows_BT.shape[1], dtype=jnp.int32)[None], rows_BT.shape)
    segments_BT, key_segments_BS = queries.segments_BC, seen.segments_BC
    if seen.valid_BC is not None:
        if segments_BT is None or key_segments_BS is None:
            segments_BT, key_segments_BS = jnp.zeros_like(rows_BT), jnp.zeros_like(seen.rows_BC)
        key_segments_BS = jnp.where(seen.valid_BC, key_segments_BS, -1)
    return splash_attention(query_BTNH, keys_BSKH, values_BSKH, rows_BT, segments_BT, key_segments_BS)


def _by_runs(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    queries: TokenView,
    keys: TokenView | None,
    backend: AttentionBackend,
) -> jax.Array:
    """Kernels whose memory is linear: every query sees one run of keys (`keys`, if given, holds rows 0..S-1)."""
    plain = keys is None and queries.segments_BC is None
    if plain and backend == "triton":
        _log_kernel("causal", "cuDNN")
        return _cudnn(query_BTNH, keys_BSKH, values_BSKH, None)
    rows, key_segments = (None, None) if keys is None else (queries.rows_BC, keys.segments_BC)
    start, end = visible_runs(rows, queries.segments_BC, key_segments, query_BTNH.shape[1])
    if keys is None and backend == "tokamax":
        _log_kernel("causal" if plain else "causal within documents", "tokamax mosaic_gpu")
        return attention_tokamax.causal_attention(query_BTNH, keys_BSKH, values_BSKH, start)
    _log_kernel("causal within documents" if keys is None else "queries over shared keys", "mor_jax triton")
    end = jnp.broadcast_to(end, query_BTNH.shape[:2])
    return flash_attention(query_BTNH, keys_BSKH, values_BSKH, start, end)


@functools.cache
def _log_kernel(mask: str, kernel: str) -> None:
    """Log once which kernel a kind of mask gets."""
    logger.info("attention kernel, %s: %s", mask, kernel)


def attend(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    queries: TokenView,
    keys: TokenView | None,
    backend: AttentionBackend,
) -> jax.Array:
    """Softmax attention, scores scaled by H^-0.5 and normalised in float32.

    Where `context` splits rows, keys and values are gathered by an all-gather, whose gradient is a reduce-scatter.
    experiments/sharding/attention.py compares it with a ring.

    Args:
        query_BTNH: queries; query head n reads key/value head n // (N / K).
        keys_BSKH: rotated keys.
        values_BSKH: values.
        queries: the queries' tokens.
        keys: the keys' tokens; None when they are the queries' own.
        backend: a resolved backend.

    Returns:
        [B, T, N, H] in the queries' dtype. Queries without any visible key return an arbitrary finite value.
    """
    masked = queries.valid_BC is not None or (keys is not None and keys.valid_BC is not None)
    if backend in ("triton", "tokamax"):
        if not masked:
            return _by_runs(query_BTNH, keys_BSKH, values_BSKH, queries, keys, backend)
        _log_kernel("with an attention mask", backend := "xla")
    if backend == "splash":
        return _splash(query_BTNH, keys_BSKH, values_BSKH, queries, keys)
    split = axis_size("context") > 1
    mask_B1TS = attention_mask(queries, keys, explicit=split)
    if not split:
        return _attend_local(query_BTNH, keys_BSKH, values_BSKH, mask_B1TS, backend)

    def local(query_BTNH: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        keys, values = (jax.lax.all_gather(a, "context", axis=1, tiled=True) for a in (keys, values))
        return _attend_local(query_BTNH, keys, values, mask, backend)

    keys_axes, mask_axes = ("batch", "sequence", "kv_heads", None), ("batch", None, "sequence", None)
    query_axes = ("batch", "sequence", "heads", None)
    sharded = on_shards(local, (query_axes, keys_axes, keys_axes, mask_axes), query_axes)
    return sharded(query_BTNH, keys_BSKH, values_BSKH, mask_B1TS)


def _attend_local(
    query_BTNH: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, backend: AttentionBackend
) -> jax.Array:
    if backend == "cudnn":
        return _cudnn(query_BTNH, keys, values, mask)
    return jax.nn.dot_product_attention(
        query_BTNH, keys, values, mask=mask, is_causal=mask is None, implementation="xla"
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding and the three key/value strategies (paper section 2.2.2)."""

    config: ModelConfig
    perf: PerfConfig

    @nn.compact
    def __call__(
        self, x_BCD: jax.Array, context: LayerContext, cached: KeyValue | None, lora: Any = None
    ) -> tuple[jax.Array, KeyValue | None]:
        """Attend from [B, C, D]; also return keys and values [B, S, K, H] if the context keeps them.

        `lora` holds this recursion's low-rank updates, if any.
        """
        if context.store is not None:
            return self._decode(x_BCD, context, context.store, cached)
        config = self.config
        width, heads, kv_heads, head_dim = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        query = self.param("query", normal_init(config, "embed", "heads", "head_dim"), (width, heads, head_dim))
        key_value = self.param(
            "key_value", normal_init(config, "embed", None, "kv_heads", "head_dim"), (width, 2, kv_heads, head_dim)
        )
        output = self.param("output", normal_init(config, "heads", "head_dim", "embed"), (heads, head_dim, width))

        query, key_value, output = (w.astype(x_BCD.dtype) for w in (query, key_value, output))
        if self.perf.fusion == "triton":
            query, key_value, output = map(compute_weight, (query, key_value, output))
        query_BCNH = jnp.einsum("BCD,DNH->BCNH", x_BCD, query)
        query_BCNH = apply_rotary(query_BCNH + low_rank(config, lora, "query", x_BCD), context.rotary)
        query_BCNH = constrain(query_BCNH, "batch", "sequence", "heads", "head_dim")
        keys, values = self._key_value(x_BCD, key_value, context, cached, lora)
        backend = resolve_backend(self.perf.attention_backend, config.dtype, head_dim)
        query_BCNH, keys, values = (
            checkpoint_name(a, n) for a, n in ((query_BCNH, "query"), (keys, "key"), (values, "value"))
        )
        if context.observe is not None:
            context.observe(query_BCNH, keys)
        with jax.named_scope("attend"):
            out_BCNH = attend(query_BCNH, keys, values, context.queries, context.keys, backend)
        out_BCNH = checkpoint_name(constrain(out_BCNH, "batch", "sequence", "heads", "head_dim"), "attention")
        out_BCD = jnp.einsum("BCNH,NHD->BCD", out_BCNH, output)
        out_BCD = out_BCD + low_rank(config, lora, "output", out_BCNH)
        return out_BCD, (keys, values) if context.keep_kv else None

    def _decode(
        self, x_BCD: jax.Array, context: LayerContext, store: KeyValueStore, cached: Any
    ) -> tuple[jax.Array, Any]:
        """Attend through a store. Its projections are one matrix: decoding waits for launches and weights."""
        config = self.config
        width, heads, head_dim = config.d_model, config.num_heads, config.head_dim
        initialiser = normal_init(config, "embed", None, "head_dim")
        joint = self.param(JOINT_PROJECTION, initialiser, (width, heads + 2 * config.num_kv_heads, head_dim))
        output = self.param("output", normal_init(config, "heads", "head_dim", "embed"), (heads, head_dim, width))
        kernel_DMH = joint if store.writes else split_last_heads(joint, 2 * config.num_kv_heads, store.shards)[0]
        projected_BCMH = jnp.einsum("BCD,DMH->BCMH", x_BCD, kernel_DMH.astype(x_BCD.dtype))
        out_BCNH, cached = store.attend(projected_BCMH, cached, context.rotary)
        return jnp.einsum("BCNH,NHD->BCD", out_BCNH, output.astype(x_BCD.dtype)), cached

    def _key_value(
        self, x_BCD: jax.Array, key_value: jax.Array, context: LayerContext, cached: KeyValue | None, lora: Any
    ) -> KeyValue:
        if cached is not None and context.update is None and context.fresh_BS is None:
            return cached
        fresh = jnp.einsum("BCD,DXKH->BCXKH", x_BCD, key_value)
        fresh = fresh + low_rank(self.config, lora, "key_value", x_BCD)
        keys, values = apply_rotary(fresh[:, :, 0], context.rotary), fresh[:, :, 1]
        if cached is None:
            return keys, values
        if context.update is not None:
            fresh_and_cached = (constrain(a, "batch", None, "kv_heads", None) for a in (keys, values, *cached))
            keys, values, old_keys, old_values = fresh_and_cached
            return merge_rows(keys, old_keys, context.update), merge_rows(values, old_values, context.update)
        assert context.fresh_BS is not None
        fresh_BS11 = context.fresh_BS[:, :, None, None]
        return jnp.where(fresh_BS11, keys, cached[0]), jnp.where(fresh_BS11, values, cached[1])

"""Softmax attention on the kernel that fits device, mask and mesh (letters: B T S N K H)."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import AttentionBackend
from mor_jax.errors import require
from mor_jax.kernels.attention import hopper as attention_hopper
from mor_jax.kernels.attention import triton as attention_gpu
from mor_jax.kernels.attention.runs import visible_runs
from mor_jax.kernels.attention.tpu import resolve_tpu_backend, splash_attention, target_platform
from mor_jax.mesh.axes import axis_size, on_shards
from mor_jax.model.layer_context import TokenView, attention_mask

logger = logging.getLogger(__name__)
_CUDNN_BLOCK = 128


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
    multiple of 8 up to 256. `mosaic` (this project's kernels for every mask that is a run of keys) needs a Hopper GPU.
    `triton` (this project's kernels for packed rows and shared keys, cuDNN for plain causality) runs on one device and
    needs a head_dim that is a power of two.

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
    fits_mosaic = attention_hopper.is_available(dtype, head_dim)
    for name, possible, rule in (
        ("cudnn", fits, "head_dim a multiple of 8 up to 256"),
        ("triton", fits_triton, "head_dim a power of two from 16 to 256"),
        ("mosaic", fits_mosaic, "head_dim 64 or 128, and compute capability 9.0 (Hopper)"),
    ):
        require(
            backend != name or possible,
            f"perf.attention_backend={name!r} needs a GPU, dtype='bfloat16' and {rule}, not "
            f"device={jax.default_backend()!r}, dtype={dtype!r}, head_dim={head_dim}",
        )
    alone = (jax.device_count() if devices is None else devices) == 1
    automatic: AttentionBackend = "cudnn" if fits else "xla"
    if fits_mosaic:
        automatic = "mosaic"
    elif fits_triton and alone:
        automatic = "triton"
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
    mask = "causal" if plain else "causal within documents" if keys is None else "queries over shared keys"
    if plain and backend == "triton":
        _log_kernel(mask, "cuDNN")
        return _cudnn(query_BTNH, keys_BSKH, values_BSKH, None)
    _log_kernel(mask, f"mor_jax {backend}")
    runs: tuple[jax.Array, ...] = ()
    if not plain:
        rows, key_segments = (None, None) if keys is None else (queries.rows_BC, keys.segments_BC)
        start, end = visible_runs(rows, queries.segments_BC, key_segments, query_BTNH.shape[1])
        end = jnp.broadcast_to(end, query_BTNH.shape[:2])
        runs = (end,) if start is None else (start, end)
    if backend == "triton":
        return attention_gpu.flash_attention(query_BTNH, keys_BSKH, values_BSKH, *_start_and_end(runs))

    def local(query_BTNH: jax.Array, keys: jax.Array, values: jax.Array, runs: tuple[jax.Array, ...]) -> jax.Array:
        return attention_hopper.flash_attention(query_BTNH, keys, values, *_start_and_end(runs))

    query_axes, keys_axes = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    in_axes = (query_axes, keys_axes, keys_axes, tuple(("batch", None) for _ in runs))
    return on_shards(local, in_axes, query_axes)(query_BTNH, keys_BSKH, values_BSKH, runs)


def _start_and_end(runs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    start, end = (None, None, *runs)[-2:]
    return start, end


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
    split = axis_size("context") > 1
    if backend in ("triton", "mosaic"):
        if not masked and not split:
            return _by_runs(query_BTNH, keys_BSKH, values_BSKH, queries, keys, backend)
        backend = "xla" if masked else "cudnn"
        _log_kernel("with an attention mask" if masked else "rows split over `context`", backend)
    if backend == "splash":
        return _splash(query_BTNH, keys_BSKH, values_BSKH, queries, keys)
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

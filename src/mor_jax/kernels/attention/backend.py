"""Softmax attention on the kernel that fits device, mask and mesh (letters: B T S N K H)."""

import functools
import logging

import jax

from mor_jax.array_types import RotaryRows
from mor_jax.config import AttentionBackend
from mor_jax.errors import require
from mor_jax.kernels.attention import cudnn, hopper, tpu, triton
from mor_jax.kernels.attention.cudnn import cudnn_attention
from mor_jax.kernels.attention.mask import Mask
from mor_jax.kernels.attention.reference import plain_attention
from mor_jax.kernels.attention.tpu import attention_on_shards
from mor_jax.kernels.choice import log_kernel
from mor_jax.kernels.pallas_triton import MISSING, is_available, require_triton
from mor_jax.mesh.axes import axis_size, on_shards
from mor_jax.mesh.devices import process_platform, target_platform

logger = logging.getLogger(__name__)
TPU_KERNELS: tuple[AttentionBackend, ...] = ("mosaic_tpu",)
"""Backends that a TPU has beside `xla`, which rotate; the custom calls of a compiled program bear these names."""


def resolve_backend(
    backend: AttentionBackend, dtype: str, head_dim: int, devices: int | None = None
) -> AttentionBackend:
    """Choose the attention kernel for the device that the program is traced for.

    Raises:
        UserError: a backend was asked for where it cannot run.
    """
    if target_platform() == "tpu":
        return resolve_tpu_backend(backend, dtype, head_dim)
    asked = f"perf.attention_backend={backend!r}"
    require(backend not in TPU_KERNELS, f"{asked} needs a TPU, not device={target_platform()!r}")
    return _resolve_backend(backend, dtype, head_dim, devices)


@functools.cache
def resolve_tpu_backend(backend: AttentionBackend, dtype: str, head_dim: int) -> AttentionBackend:
    """Choose the attention kernel of a TPU, and log it once."""
    fits = tpu.takes(head_dim)
    asked = f"perf.attention_backend={backend!r}"
    require(backend in ("auto", "xla", *TPU_KERNELS), f"{asked} is a kernel for GPUs, but the device is a TPU")
    require(
        backend not in TPU_KERNELS or fits,
        f"{asked} needs a head_dim that is a multiple of 64, not head_dim={head_dim}",
    )
    chosen: AttentionBackend = ("mosaic_tpu" if fits else "xla") if backend == "auto" else backend
    logger.info("attention backend: %s on TPU (asked for %s, dtype %s, head_dim %d)", chosen, backend, dtype, head_dim)
    return chosen


@functools.cache
def _resolve_backend(
    backend: AttentionBackend, dtype: str, head_dim: int, devices: int | None = None
) -> AttentionBackend:
    """Choose the attention kernel for this process's device, and log it once.

    `xla` runs everywhere and holds the [T, S] scores in memory. `cudnn` needs a GPU, bfloat16 and a head_dim that is a
    multiple of 8 up to 256. `mosaic` (this project's kernels for every mask that is a run of keys) needs a Hopper GPU.
    `triton` (this project's kernels for packed rows and shared keys, cuDNN for plain causality) runs on one device,
    needs a head_dim that is a power of two, and a JAX that has Pallas' Triton backend.

    Args:
        backend: asked for.
        dtype: of the model.
        head_dim: of the model.
        devices: of the mesh; None takes the process's view of all.

    Raises:
        UserError: a backend was asked for where it cannot run.
    """
    if backend == "triton":
        require_triton("perf.attention_backend='triton'")
    fits = process_platform() == "gpu" and cudnn.takes(dtype, head_dim)
    fits_triton = fits and triton.takes(dtype, head_dim)
    fits_mosaic = hopper.is_available(dtype, head_dim)
    for name, possible, rule in (
        ("cudnn", fits, "head_dim a multiple of 8 up to 256"),
        ("triton", fits_triton, "head_dim a power of two from 16 to 256"),
        ("mosaic", fits_mosaic, "head_dim 64 or 128, and compute capability 9.0 (Hopper)"),
    ):
        require(
            backend != name or possible,
            f"perf.attention_backend={name!r} needs a GPU, dtype='bfloat16' and {rule}, not "
            f"device={process_platform()!r}, dtype={dtype!r}, head_dim={head_dim}",
        )
    alone = (jax.device_count() if devices is None else devices) == 1
    automatic: AttentionBackend = "cudnn" if fits else "xla"
    if fits_mosaic:
        automatic = "mosaic"
    elif fits_triton and alone:
        automatic = "triton"
    chosen: AttentionBackend = automatic if backend == "auto" else backend
    without = f"; {MISSING}" if chosen == "cudnn" and backend == "auto" and not is_available() else ""
    logger.info("attention backend: %s (asked for %s%s)", chosen, backend, without)
    return chosen


def attend(
    query_BTNH: jax.Array,
    keys_BSKH: jax.Array,
    values_BSKH: jax.Array,
    mask: Mask,
    backend: AttentionBackend,
    rotary: RotaryRows | None = None,
) -> jax.Array:
    """Softmax attention, scores scaled by H^-0.5 and normalised in float32.

    Where `context` splits rows, keys and values are gathered by an all-gather, whose gradient is a reduce-scatter.
    experiments/sharding/attention.py compares it with a ring.

    Args:
        query_BTNH: queries; query head n reads key/value head n // (N / K).
        keys_BSKH: keys.
        values_BSKH: values.
        mask: which keys a query sees.
        backend: a resolved backend.
        rotary: what a backend of TPU_KERNELS rotates queries and keys by first; None where they are rotated already.

    Returns:
        [B, T, N, H] in the queries' dtype. Queries without any visible key return an arbitrary finite value.
    """
    if backend in TPU_KERNELS:
        return attention_on_shards(query_BTNH, keys_BSKH, values_BSKH, mask, rotary)
    assert rotary is None, f"{backend} does not rotate"
    tensors, split = (query_BTNH, keys_BSKH, values_BSKH), axis_size("context") > 1
    if backend in ("triton", "mosaic"):
        if mask.is_runs and not split:
            return _by_runs(*tensors, mask, backend)
        backend = "cudnn" if mask.is_runs else "xla"
        log_kernel(f"attention, {mask.kind if not mask.is_runs else 'rows split over `context`'}", backend)
    attention = cudnn_attention if backend == "cudnn" else plain_attention
    if not split:
        return attention(*tensors, None if mask.is_causal else mask.dense())

    def local(query_BTNH: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        keys, values = (jax.lax.all_gather(a, "context", axis=1, tiled=True) for a in (keys, values))
        return attention(query_BTNH, keys, values, mask)

    keys_axes, mask_axes = ("batch", "sequence", "kv_heads", None), ("batch", None, "sequence", None)
    query_axes = ("batch", "sequence", "heads", None)
    return on_shards(local, (query_axes, keys_axes, keys_axes, mask_axes), query_axes)(*tensors, mask.dense())


def _by_runs(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, mask: Mask, backend: AttentionBackend
) -> jax.Array:
    """Kernels whose memory is linear: every query sees one run of keys."""
    tensors = (query_BTNH, keys_BSKH, values_BSKH)
    if mask.is_causal and backend == "triton":
        log_kernel("attention, causal", "cuDNN")
        return cudnn_attention(*tensors, None)
    log_kernel(f"attention, {mask.kind}", f"mor_jax {backend}")
    start_BT, end_BT = mask.runs()
    if backend == "triton":
        assert end_BT is not None
        return triton.flash_attention(*tensors, start_BT, end_BT)
    query_axes, keys_axes = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    run_axes = tuple(None if x_BT is None else ("batch", None) for x_BT in (start_BT, end_BT))
    in_axes = (query_axes, keys_axes, keys_axes, *run_axes)
    return on_shards(hopper.flash_attention, in_axes, query_axes)(*tensors, start_BT, end_BT)

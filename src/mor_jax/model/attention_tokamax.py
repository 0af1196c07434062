"""Causal attention through tokamax's Hopper kernels (optional extra `gpu`): the one place that touches its classes."""

import functools
import importlib.util
import logging
from typing import Any

import jax

_log = logging.getLogger(__name__)


@functools.cache
def is_available() -> bool:
    """Whether tokamax is installed and this process's GPU is one its kernels are written for."""
    if importlib.util.find_spec("tokamax") is None or jax.default_backend() != "gpu":
        return False
    try:
        _operation()
    except Exception as error:  # another version of tokamax or of what it needs
        _log.warning("tokamax is installed but cannot be used: %r", error)
        return False
    return jax.devices()[0].compute_capability.startswith("9.")


@functools.cache
def _operation() -> Any:
    """The Mosaic-GPU operation, with the block sizes that were fastest at head_dim 64 (docs/performance.md)."""
    from tokamax._src.ops.attention import pallas_mosaic_gpu as forward  # pyright: ignore[reportMissingImports]
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp as backward  # pyright: ignore[reportMissingImports]
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp_common import Config  # pyright: ignore[reportMissingImports]

    grad = Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=128, num_stages=2, compute_wgs=2)
    return forward.PallasMosaicGpuFlashAttention(
        config=forward.ConfigSM90(block_q=64, block_kv=128, num_stages=2, persistent=False),
        vjp=backward.PallasMosaicGpuFlashAttentionVjp(config=grad),
    )


def causal_attention(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, start_BT: jax.Array | None
) -> jax.Array:
    """Causal softmax attention; query t sees the keys ``start <= s <= t``.

    Args:
        query_BTNH: bfloat16 queries.
        key_BTKH: keys.
        value_BTKH: values.
        start_BT: int32, first key of each query; None is 0.
    """
    from tokamax._src.ops.attention.base import Mask  # pyright: ignore[reportMissingImports]

    start = None if start_BT is None else start_BT[:, None, :]
    return _operation()(query_BTNH, key_BTKH, value_BTKH, mask=Mask(is_causal=True, k_start=start))

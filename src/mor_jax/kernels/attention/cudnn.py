"""cuDNN's attention, which NVIDIA GPUs have without a kernel of ours (letters: B T S N K H)."""

import jax

from mor_jax.kernels.padding import pad_axis

_BLOCK = 128


def takes(dtype: str, head_dim: int) -> bool:
    """Whether cuDNN takes such arrays."""
    return dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 256


def cudnn_attention(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, mask_B1TS: jax.Array | None
) -> jax.Array:
    """As ``plain_attention``, on a GPU.

    Padded where cuDNN needs it: to even lengths (JAX's rule in training), or to its block when it takes a mask.
    """
    if mask_B1TS is None and query_BTNH.shape[1] % 2 == 0:
        return jax.nn.dot_product_attention(query_BTNH, keys_BSKH, values_BSKH, is_causal=True, implementation="cudnn")
    length = query_BTNH.shape[1]
    query_BTNH, keys_BSKH, values_BSKH = (pad_axis(x, 1, _BLOCK) for x in (query_BTNH, keys_BSKH, values_BSKH))
    if mask_B1TS is not None:
        mask_B1TS = pad_axis(pad_axis(mask_B1TS, 3, _BLOCK, False), 2, _BLOCK, True)
    out_BTNH = jax.nn.dot_product_attention(
        query_BTNH, keys_BSKH, values_BSKH, mask=mask_B1TS, is_causal=mask_B1TS is None, implementation="cudnn"
    )
    return out_BTNH[:, :length]

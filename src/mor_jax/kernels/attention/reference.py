"""Plain attention: what every kernel is tested against, and what runs everywhere (letters: B T S N K H)."""

import jax


def plain_attention(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, mask_B1TS: jax.Array | None
) -> jax.Array:
    """Softmax attention by XLA, scores scaled by H^-0.5 and held in memory in float32.

    Args:
        query_BTNH: queries; query head n reads key/value head n // (N / K).
        keys_BSKH: keys.
        values_BSKH: values.
        mask_B1TS: bool, which keys a query sees; None is plain causality.

    Returns:
        [B, T, N, H] in the queries' dtype. Queries without any visible key return an arbitrary finite value.
    """
    return jax.nn.dot_product_attention(
        query_BTNH, keys_BSKH, values_BSKH, mask=mask_B1TS, is_causal=mask_B1TS is None, implementation="xla"
    )

"""Rows of the embedding table, with a gradient that is summed in float32 (letters: V D B T)."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the tokens' rows of a table; its gradient's sums over tokens are float32, rounded once at the end.

    In bfloat16 a sum over the thousands of places of a frequent word stops growing, and GPUs add it by
    compare-and-swap, one place after the other. There is no forward-mode derivative.

    Args:
        table_VD: of any float dtype.
        tokens_BT: int; those outside the table take its nearest row.

    Returns:
        [B, T, D] of the table's dtype.
    """
    return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")


def _forward(table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table_VD, tokens_BT), (table_VD, tokens_BT)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
    table_VD, tokens_BT = kept
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    places_BT = jnp.clip(tokens_BT, 0, table_VD.shape[0] - 1)
    return zeros_VD.at[places_BT].add(gradient_BTD.astype(jnp.float32)).astype(table_VD.dtype), None


look_up.defvjp(_forward, _backward)

"""Lengths that kernels want in whole blocks."""

import jax
import jax.numpy as jnp


def pad_axis(x: jax.Array, axis: int, multiple: int, value: int | bool = 0) -> jax.Array:
    """Lengthen an axis to a multiple with ``value``; nothing is done to one that is whole."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x

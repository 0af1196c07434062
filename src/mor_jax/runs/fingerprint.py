"""Fingerprints of arrays that do not depend on the mesh: one flipped bit anywhere changes them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
    """Scramble uint32 words (the finaliser of MurmurHash3, public domain)."""
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _fingerprint(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


@jax.jit
def fingerprints(tree: Any) -> Any:
    """Return a tree of uint32 scalars: per leaf the sum of a hash of (position, bits) over its elements.

    The sum wraps and commutes, so the value is the same for every sharding and device count.

    Args:
        tree: arrays of 1-, 2- or 4-byte elements (random keys as their data).
    """
    return jax.tree.map(_fingerprint, tree)

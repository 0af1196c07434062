"""Types of the parameter tree and of keys and values, and the letters that shapes are written with.

B batch, T query positions, S key positions, D model, F feed-forward, N query heads, K key/value heads, G = N / K,
H head width, V vocabulary, R recursions, L layers in the shared block, C routed capacity (tokens of one recursion).
Local names carry their axes: ``x_BTD``, ``keys_BSKH``, ``index_BC``; docstrings state dtypes, and shapes beyond that.
"""

from collections.abc import Mapping
from typing import Any

import jax

Params = Mapping[str, Any]
KeyValue = tuple[jax.Array, jax.Array]
"""Keys and values of one layer."""
RotaryRows = tuple[jax.Array, jax.Array]
"""Cosine above sine of the rotary angles, float32, of queries [B, H, T] and of keys [B, H, S], along the lanes."""

"""Logical axes and sizes of a layer's weights, without JAX: what its low-rank updates and its exact costs share.

Letters: D model, F feed-forward, N query heads, K key/value heads, H head width.
"""

import math

from mor_jax.config import LoraTarget, ModelConfig

Axes = dict[str | None, int]


def weight_axes(config: ModelConfig, weight: LoraTarget) -> tuple[Axes, Axes]:
    """Return the logical axes of a weight's input and output with their sizes (``None`` is the fused pair)."""
    embed: Axes = {"embed": config.d_model}
    heads: Axes = {"heads": config.num_heads, "head_dim": config.head_dim}
    both: Axes = {None: 2, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return {
        "query": (embed, heads),
        "key_value": (embed, both),
        "output": (heads, embed),
        "gate_up": (embed, {None: 2, "ffn": config.d_ff}),
        "down": ({"ffn": config.d_ff}, embed),
    }[weight]


def widths(config: ModelConfig, weight: LoraTarget) -> tuple[int, int]:
    """Return a weight's input and output width: it has their product of entries."""
    inputs, outputs = weight_axes(config, weight)
    return math.prod(inputs.values()), math.prod(outputs.values())

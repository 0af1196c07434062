"""What lets recursions differ although they share a block: norms, low-rank updates, an encoding (paper table 16).

Parameters are stacked [R, ...] and reach the layers as one tree [R, L, ...] of ``collect_unshared``. Letters: D model,
F feed-forward, N query heads, K key/value heads, H head width, R recursions, L layers in the block, P rank.

References: Hu et al., LoRA (2021); Bae et al., Relaxed Recursive Transformers (2025), for the initialisation from the
singular value decomposition of what sharing takes away from a full model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import LoraTarget, ModelConfig
from mor_jax.model.modern_parts import collect_parts
from mor_jax.model.weight_axes import weight_axes

Unshared = dict[str, Any]
"""What recursions do not share, by name: `attention_norm`, `ffn_norm`, `lora`, `encoding`; see ``collect_parts``."""
Lora = dict[str, jax.Array]
_GROUP: dict[LoraTarget, str] = {
    "query": "attention",
    "key_value": "attention",
    "output": "attention",
    "gate_up": "ffn",
    "down": "ffn",
}
"""Module of the layer that holds each target."""


class StackedNorms(nn.Module):
    """Norm scales [R, L, D] of a block whose recursions do not share them."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Unshared:
        """Return the scales of both norms."""
        return {name: {"scale": _StackedScale(self.config, name=name)()} for name in ("attention_norm", "ffn_norm")}


class _StackedScale(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        config = self.config
        initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("recursions", "layers", "embed"))
        return self.param("scale", initialiser, (config.recursion.num_recursions, config.block_depth, config.d_model))


class StackedLora(nn.Module):
    """Low-rank updates [R, L, ...] of a block: `down` at random, `up` zero: training starts at the shared block."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Lora]:
        """Return {target: {down: [R, L, in..., P], up: [R, L, P, out...]}}."""
        config, relaxation = self.config, self.config.recursion.relaxation
        stack = (config.recursion.num_recursions, config.block_depth)
        names = ("recursions", "layers")
        pairs: dict[str, Lora] = {}
        for target in relaxation.lora_targets:
            inputs, outputs = weight_axes(config, target)
            normal = nn.initializers.normal(config.init_std)
            down: Any = self.param(
                f"{target}_down",
                nn.with_logical_partitioning(normal, (*names, *inputs, None)),
                (*stack, *inputs.values(), relaxation.lora_rank),
            )
            up: Any = self.param(
                f"{target}_up",
                nn.with_logical_partitioning(nn.initializers.zeros, (*names, None, *outputs)),
                (*stack, relaxation.lora_rank, *outputs.values()),
            )
            pairs[target] = {"down": down, "up": up}
        return pairs


class Encoding(nn.Module):
    """A learned vector [R, D] per recursion that multiplies the block's output, one at first (as released)."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        """Return the vectors."""
        initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("recursions", "embed"))
        return self.param("scale", initialiser, (self.config.recursion.num_recursions, self.config.d_model))


def collect_unshared(config: ModelConfig, values_of: Callable[[type[nn.Module], str], Any]) -> Unshared | None:
    """Collect what the recursions do not share, leaves [R, L, ...]; None if they share everything.

    Args:
        config: the model.
        values_of: returns what a module of this file returns, given its class and the name of its parameters.
    """
    own: Unshared = {}
    if not config.recursion.share_norms:
        own |= values_of(StackedNorms, "block_norms")
    if config.recursion.relaxation.lora_rank:
        own["lora"] = values_of(StackedLora, "lora")
    if config.recursion.relaxation.encoding:  # multiplies the output of the block, so it is one but for the last layer
        scale_RD = values_of(Encoding, "encoding")
        widths = ((0, 0), (config.block_depth - 1, 0), (0, 0))
        own["encoding"] = jnp.pad(scale_RD[:, None], widths, constant_values=1.0)
    return own | collect_parts(config, values_of) or None


def low_rank(config: ModelConfig, lora: dict[str, Lora] | None, target: LoraTarget, x: jax.Array) -> jax.Array | float:
    """What one layer's update of a target adds to its output for input x [B, C, in...]; 0 without one."""
    if lora is None or target not in lora:
        return 0.0
    down, up = (lora[target][name].astype(x.dtype) for name in ("down", "up"))
    narrow_BCP = jnp.tensordot(x, down, axes=down.ndim - 1)
    return config.recursion.relaxation.lora_scale * jnp.tensordot(narrow_BCP, up, axes=1)


def update_of(config: ModelConfig, lora: Any, target: LoraTarget, recursion: int, layer: int) -> np.ndarray:
    """Return what a recursion adds to a target's weight in one layer: float32 [in..., out...] on the host."""
    down = np.asarray(lora[f"{target}_down"][recursion, layer], np.float32)
    up = np.asarray(lora[f"{target}_up"][recursion, layer], np.float32)
    return config.recursion.relaxation.lora_scale * np.tensordot(down, up, axes=1)


def lora_from_residuals(
    config: ModelConfig, block: Any, full: Any, layers_RL: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Take the best low-rank updates that bring a shared block back towards the full model's layers.

    Args:
        config: the recursive model; its `lora_rank`, targets and scale.
        block: shared block's parameters [L, ...], numpy.
        full: full model's stacked layers [layers, ...], numpy.
        layers_RL: layer of the full model that recursion r's layer l stands for.

    Returns:
        Parameters of ``StackedLora``, float32: the truncated singular value decomposition of every residual.
    """
    relaxation = config.recursion.relaxation
    built: dict[str, list[list[np.ndarray]]] = {}
    for target in relaxation.lora_targets:
        group = _GROUP[target]
        rank = relaxation.lora_rank
        downs, ups = [], []
        for row in layers_RL:
            pairs = [
                _truncated(config, target, full[group][target][layer] - block[group][target][own], rank)
                for own, layer in enumerate(row)
            ]
            downs.append([down for down, _ in pairs])
            ups.append([up for _, up in pairs])
        built |= {f"{target}_down": downs, f"{target}_up": ups}
    return {name: np.asarray(values, np.float32) for name, values in built.items()}


def _truncated(
    config: ModelConfig, target: LoraTarget, residual: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = (tuple(axes.values()) for axes in weight_axes(config, target))
    width = int(np.prod(inputs))
    left, values, right = np.linalg.svd(residual.reshape(width, -1).astype(np.float32), full_matrices=False)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    down = np.zeros((width, rank), np.float32)
    up = np.zeros((rank, right.shape[1]), np.float32)
    down[:, :kept] = left[:, :kept] * root
    up[:kept] = root[:, None] * right[:kept] / config.recursion.relaxation.lora_scale
    return down.reshape(*inputs, rank), up.reshape(rank, *outputs)

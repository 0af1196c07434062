"""Llama building blocks: initialisers, RMSNorm, rotary embedding, SwiGLU (letters: B C D F H N K)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import ModelConfig
from mor_jax.model.relaxation import low_rank

Rotary = tuple[jax.Array, jax.Array]


def normal_init(config: ModelConfig, *axes: str | None) -> Callable[..., Any]:
    """N(0, init_std) with logical axis names attached."""
    return nn.with_logical_partitioning(nn.initializers.normal(config.init_std), axes)


def rms_norm(x_BCD: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype; scale [D] or [B, 1, D]."""
    x32_BCD = x_BCD.astype(jnp.float32)
    inverse_BC1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BCD), axis=-1, keepdims=True) + epsilon)
    scale_BCD = scale[None, None, :] if scale.ndim == 1 else scale
    return (x32_BCD * inverse_BC1 * scale_BCD.astype(jnp.float32)).astype(x_BCD.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale; `scale_D` given by the caller replaces its own (per-recursion norms)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BCD: jax.Array, scale_D: jax.Array | None = None) -> jax.Array:
        """Normalise [B, C, D]."""
        scale: Any = scale_D
        if scale is None:
            initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
            scale = self.param("scale", initialiser, (self.config.d_model,))
        return rms_norm(x_BCD, scale, self.config.norm_epsilon)


def rotary_tables(positions_BC: jax.Array, head_dim: int, theta: float) -> Rotary:
    """Cosine and sine of the rotary angles, float32 [B, C, 1, H/2] each, at integer positions."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BC.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BCNH: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate the halves of every head (the rotate-half convention of Llama), in float32, back to x's dtype."""
    cos, sin = rotary
    first, second = jnp.split(x_BCNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BCNH.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward: (silu(x W_gate) * x W_up) W_down, the first two fused."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BCD: jax.Array, lora: Any = None) -> jax.Array:
        """Transform [B, C, D]; `lora` holds this recursion's low-rank updates, if any."""
        config = self.config
        gate_up = self.param("gate_up", normal_init(config, "embed", None, "ffn"), (config.d_model, 2, config.d_ff))
        down = self.param("down", normal_init(config, "ffn", "embed"), (config.d_ff, config.d_model))
        hidden_BCXF = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up.astype(x_BCD.dtype))
        hidden_BCXF = hidden_BCXF + low_rank(config, lora, "gate_up", x_BCD)
        hidden_BCXF = checkpoint_name(hidden_BCXF, "gate_up")
        activated_BCF = nn.silu(hidden_BCXF[:, :, 0]) * hidden_BCXF[:, :, 1]
        out_BCD = jnp.einsum("BCF,FD->BCD", activated_BCF, down.astype(x_BCD.dtype))
        return out_BCD + low_rank(config, lora, "down", activated_BCF)

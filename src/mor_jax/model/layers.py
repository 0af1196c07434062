"""Llama building blocks: initialisers, RMSNorm, rotary embedding, SwiGLU (letters: B C D F H N K)."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import ModelConfig, ResolvedPerf
from mor_jax.kernels.norm import add_norm, skip_norm, swiglu
from mor_jax.kernels.swiglu_hopper import feed_forward
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
    """RMSNorm of the residual stream with a learned scale; the caller's `scale_D` replaces it (unshared norms)."""

    config: ModelConfig
    fused: bool = False
    """Whether this project's GPU kernels compute it."""

    @nn.compact
    def __call__(
        self, x_BCD: jax.Array, delta_BCD: jax.Array | None = None, scale_D: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return (x + delta, its norm); both feed on, so their gradients can be added in one pass."""
        epsilon, scale = self.config.norm_epsilon, scale_D
        if scale is None:
            initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
            scale = cast(jax.Array, self.param("scale", initialiser, (self.config.d_model,)))
        if self.fused and delta_BCD is not None:
            return add_norm(x_BCD, delta_BCD, scale, epsilon)
        if self.fused:
            return skip_norm(x_BCD, scale, epsilon)
        x_BCD = x_BCD if delta_BCD is None else x_BCD + delta_BCD
        return x_BCD, rms_norm(x_BCD, scale, epsilon)


@jax.custom_vjp
def compute_weight(weight: jax.Array) -> jax.Array:
    """Return a weight whose gradient is finished before anything else is fused with it.

    Without this XLA fuses the sums over recursions, layers and split products into the gradient norm's reduction, at a
    tenth of the memory's speed.
    """
    return weight


compute_weight.defvjp(
    lambda weight: (weight, None),
    lambda _, grad: (jax.lax.optimization_barrier(grad),),
)


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
    perf: ResolvedPerf

    @nn.compact
    def __call__(self, x_BCD: jax.Array, lora: Any = None) -> jax.Array:
        """Transform [B, C, D]; `lora` holds this recursion's low-rank updates, if any."""
        config = self.config
        gate_up: Any = self.param(
            "gate_up", normal_init(config, "embed", None, "ffn"), (config.d_model, 2, config.d_ff)
        )
        down: Any = self.param("down", normal_init(config, "ffn", "embed"), (config.d_ff, config.d_model))
        gate_up, down = (w.astype(x_BCD.dtype) for w in (gate_up, down))
        if self.perf.fused:
            gate_up, down = compute_weight(gate_up), compute_weight(down)
        if self.perf.fusion == "mosaic" and not {"gate_up", "down"} & set(lora or ()):
            return feed_forward(x_BCD, gate_up, down)
        hidden_BCXF = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up) + low_rank(config, lora, "gate_up", x_BCD)
        hidden_BCXF = checkpoint_name(hidden_BCXF, "gate_up")
        activated_BCF = swiglu(hidden_BCXF) if self.perf.fused else nn.silu(hidden_BCXF[:, :, 0]) * hidden_BCXF[:, :, 1]
        return jnp.einsum("BCF,FD->BCD", activated_BCF, down) + low_rank(config, lora, "down", activated_BCF)

"""Llama building blocks: initialisers, RMSNorm, SwiGLU (letters: B C D F X, gate and up)."""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax

from mor_jax.config import Kernels, ModelConfig, ResolvedPerf
from mor_jax.kernels.norm import residual_norm
from mor_jax.kernels.swiglu import feed_forward
from mor_jax.model.relaxation import low_rank


def normal_init(config: ModelConfig, *axes: str | None) -> Callable[..., Any]:
    """N(0, init_std) with logical axis names attached."""
    return nn.with_logical_partitioning(nn.initializers.normal(config.init_std), axes)


class RMSNorm(nn.Module):
    """RMSNorm of the residual stream with a learned scale; the caller's `scale_D` replaces it (unshared norms)."""

    config: ModelConfig
    fusion: Kernels = "xla"

    @nn.compact
    def __call__(
        self,
        x_BCD: jax.Array,
        delta_BCD: jax.Array | None = None,
        scale_D: jax.Array | None = None,
        squares_BC: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return (x + delta, its norm); both feed on, so their gradients can be added in one pass."""
        scale = scale_D
        if scale is None:
            initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
            scale = cast(jax.Array, self.param("scale", initialiser, (self.config.d_model,)))
        return residual_norm(x_BCD, delta_BCD, scale, self.config.norm_epsilon, self.fusion, squares_BC)


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
        down_init = normal_init(config, "ffn", "embed")
        down: Any = self.param("down", down_init, (config.d_ff, config.d_model))
        gate_up, down = (w.astype(x_BCD.dtype) for w in (gate_up, down))
        if self.perf.fused:
            gate_up, down = compute_weight(gate_up), compute_weight(down)
        updated = {"gate_up", "down"} & set(lora or ())
        update = functools.partial(low_rank, config, lora) if updated else None
        return feed_forward(x_BCD, gate_up, down, self.perf.fusion, update)

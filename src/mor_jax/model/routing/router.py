"""The router: a network that scores tokens, and what its scores mean as gates (paper section 2.2.1).

Letters: B rows, T tokens, C computed tokens, D width, R recursions.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.mesh.axes import constrain

RouterParams = dict[str, jax.Array]


class Router(nn.Module):
    """Declares router parameters: expert-choice one router per recursion, stacked [R, ...]; token-choice one."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> RouterParams:
        """Return the parameters; `raw_scores` applies them."""
        config, routing = self.config, self.config.routing
        recursions = config.recursion.num_recursions
        stack, names = ((recursions,), ("recursions",)) if routing.kind == "expert" else ((), ())
        outputs = 1 if routing.kind == "expert" else recursions
        initialiser = nn.initializers.normal(config.init_std)

        def declare(name: str, shape: tuple[int, int], axes: tuple[str | None, ...]) -> Any:
            return self.param(name, nn.with_logical_partitioning(initialiser, (*names, *axes)), (*stack, *shape))

        if routing.router == "linear":
            return {"kernel": declare("kernel", (config.d_model, outputs), ("embed", None))}
        width = routing.hidden_expansion * config.d_model
        return {
            "hidden": declare("hidden", (config.d_model, width), ("embed", None)),
            "output": declare("output", (width, outputs), (None, None)),
        }


@jax.named_scope("routing")
def raw_scores(params: RouterParams, x_BTD: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Raw float32 router output [B, T, outputs] of one router; the temperature divides the input (as released)."""
    x_BTD = x_BTD.astype(jnp.float32) / temperature
    if _is_linear(params):
        raw = _matmul(x_BTD, params["kernel"])
    else:
        raw = _matmul(nn.gelu(_matmul(x_BTD, params["hidden"]), approximate=False), params["output"])
    # computed where the tokens are, and only then gathered: selection sees whole rows
    return constrain(constrain(raw, "batch", "sequence", None), "batch", None, None)


@jax.named_scope("routing")
def raw_scores_at(
    params: RouterParams, x_BTD: jax.Array, recursion_BT: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Raw float32 score [B, T] of each token by the router of its own recursion (expert-choice, while decoding).

    Args:
        params: of all recursions, leaves [R, ...].
        x_BTD: hidden states.
        recursion_BT: int32 recursion of each token; beyond the last it counts as the last.
        temperature: divides the input.
    """
    if _is_linear(params):
        # each token's own router, as one element-wise sum
        kernel_RD = params["kernel"][:, :, 0].astype(jnp.float32)
        kernel_BTD = kernel_RD.at[recursion_BT].get(mode="clip")
        return jnp.sum(x_BTD.astype(jnp.float32) / temperature * kernel_BTD, axis=-1)
    raw_RBT = jax.vmap(lambda router: raw_scores(router, x_BTD, temperature)[:, :, 0])(params)
    recursion_1BT = jnp.minimum(recursion_BT, raw_RBT.shape[0] - 1)[None]
    return jnp.take_along_axis(raw_RBT, recursion_1BT, axis=0)[0]


def _is_linear(params: RouterParams) -> bool:
    return "kernel" in params


def _matmul(x_BTX: jax.Array, kernel_XY: jax.Array) -> jax.Array:
    # full float32: selection ranks these scores, and lower precision makes ties
    kernel_XY = kernel_XY.astype(jnp.float32)
    return jnp.einsum("BTX,XY->BTY", x_BTX, kernel_XY, precision=jax.lax.Precision.HIGHEST)


@jax.named_scope("routing")
def score(config: ModelConfig, raw: jax.Array) -> jax.Array:
    """Raw router output to gate: alpha times the score function (softmax over the last axis).

    A random router's numbers are scores already, as in the release.
    """
    functions = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "softmax": jax.nn.softmax, "none": lambda x: x}
    return config.routing.alpha * (raw if config.routing.random else functions[config.routing.score](raw))


@jax.named_scope("routing")
def gated(
    config: ModelConfig,
    gate_BC: jax.Array,
    out_BCD: jax.Array,
    x_BCD: jax.Array,
    step: int | jax.Array | None = None,
) -> jax.Array:
    """What a token's residual stream receives: g * block(x), or g * (block(x) - x) in the `plain` form.

    While the gate warms up (0-based optimiser ``step``) it is mixed with block(x) - x, which makes of the stream what
    a pass without a router does.
    """
    delta_BCD = out_BCD if config.routing.residual == "paper" else out_BCD - x_BCD
    if config.routing.gating == "weighted":
        delta_BCD = gate_BC[:, :, None].astype(out_BCD.dtype) * delta_BCD
    warmup = config.routing.gate_warmup_steps
    if step is None or not warmup:
        return delta_BCD
    share = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup).astype(out_BCD.dtype)
    return share * delta_BCD + (1 - share) * (out_BCD - x_BCD)

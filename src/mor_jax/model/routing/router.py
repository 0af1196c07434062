"""Routers: raw scores, gates, router losses and statistics (paper sections 2.2.1 and 3.3, tables 13 and 14).

Losses and statistics are pure functions of dense [R, B, T] arrays, so that every execution shares them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.mesh.axes import constrain
from mor_jax.model.routing.trace import RoutingLosses, RoutingStatistics

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
    if "kernel" in params:
        raw = _matmul(x_BTD, params["kernel"])
    else:
        raw = _matmul(nn.gelu(_matmul(x_BTD, params["hidden"]), approximate=False), params["output"])
    # computed where the tokens are, and only then gathered: selection sees whole rows
    return constrain(constrain(raw, "batch", "sequence", None), "batch", None, None)


def _matmul(x_BTX: jax.Array, kernel_XY: jax.Array) -> jax.Array:
    # full float32: selection ranks these scores, and lower precision makes ties
    kernel_XY = kernel_XY.astype(jnp.float32)
    return jnp.einsum("BTX,XY->BTY", x_BTX, kernel_XY, precision=jax.lax.Precision.HIGHEST)


@jax.named_scope("routing")
def score(config: ModelConfig, raw: jax.Array) -> jax.Array:
    """Raw router output to gate: alpha times the score function (softmax over the last axis)."""
    functions = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "softmax": jax.nn.softmax, "none": lambda x: x}
    return config.routing.alpha * functions[config.routing.score](raw)


@jax.named_scope("routing")
def gated(config: ModelConfig, gate_BC: jax.Array, out_BCD: jax.Array, x_BCD: jax.Array) -> jax.Array:
    """What a token's residual stream receives: g * block(x), or g * (block(x) - x) in the `plain` form."""
    delta_BCD = out_BCD if config.routing.residual == "paper" else out_BCD - x_BCD
    if config.routing.gating == "additive":
        return delta_BCD
    return gate_BC[:, :, None].astype(out_BCD.dtype) * delta_BCD


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean over all axes, 0 if nothing has weight."""
    weights = weights.astype(jnp.float32)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def _selection_loss(raw_RBT: jax.Array, active_RBT: jax.Array, selected_RBT: jax.Array) -> jax.Array:
    """Binary cross-entropy of raw scores against "was selected": mean over active tokens, summed over recursions."""
    target_RBT = selected_RBT.astype(jnp.float32)
    loss_RBT = jax.nn.softplus(raw_RBT) - raw_RBT * target_RBT
    return jnp.sum(jax.vmap(_mean)(loss_RBT, active_RBT))


def expert_losses(
    config: ModelConfig,
    raw_RBT: jax.Array,
    aux_RBT: jax.Array | None,
    active_RBT: jax.Array,
    selected_RBT: jax.Array,
) -> RoutingLosses:
    """Expert-choice losses: sampling (auxiliary loss or auxiliary router) and z-loss (table 13)."""
    losses = RoutingLosses.zero()
    if config.routing.sampling == "aux_loss":
        losses = dataclasses.replace(losses, sampling=_selection_loss(raw_RBT, active_RBT, selected_RBT))
    if aux_RBT is not None:
        losses = dataclasses.replace(losses, aux_router=_selection_loss(aux_RBT, active_RBT, selected_RBT))
    # the log-sum-exp of one score is the score itself
    return dataclasses.replace(losses, router_z=jnp.sum(jax.vmap(_mean)(jnp.square(raw_RBT), active_RBT)))


def token_losses(config: ModelConfig, raw_BTR: jax.Array, load_R: jax.Array, counted_BT: jax.Array) -> RoutingLosses:
    """Token-choice losses: balancing (sum of mean score times N_r x share) and z-loss (table 14)."""
    z = _mean(jnp.square(jax.nn.logsumexp(raw_BTR, axis=-1)), counted_BT)
    losses = dataclasses.replace(RoutingLosses.zero(), router_z=z)
    if config.routing.balancing != "loss":
        return losses
    mean_R = jax.vmap(_mean, in_axes=(-1, None))(score(config, raw_BTR), counted_BT)
    recursions = config.recursion.num_recursions
    return dataclasses.replace(losses, balancing=jnp.sum(mean_R * recursions * jax.lax.stop_gradient(load_R)))


def depth_shares(depth_BT: jax.Array, counted_BT: jax.Array, recursions: int) -> jax.Array:
    """Share of the counted tokens at depth 0, 1, ..., R: float32 [R + 1]."""
    one_hot = depth_BT[:, :, None] == jnp.arange(recursions + 1)[None, None, :]
    return jax.vmap(_mean, in_axes=(-1, None))(one_hot.astype(jnp.float32), counted_BT)


def statistics(
    config: ModelConfig,
    *,
    depth_BT: jax.Array,
    chosen_BT: jax.Array,
    decision_RBT: jax.Array | None,
    active_RBT: jax.Array,
    selected_RBT: jax.Array,
    counted_BT: jax.Array,
) -> RoutingStatistics:
    """Summarise where tokens went.

    Args:
        config: the model.
        depth_BT: passes completed.
        chosen_BT: passes that the router asked for.
        decision_RBT: whether the causal boundary would select a token; None for token-choice (it always agrees).
        active_RBT: whether a recursion could choose the token.
        selected_RBT: whether it did.
        counted_BT: whether the token counts (not padding).
    """
    recursions = config.recursion.num_recursions
    load_R = depth_shares(chosen_BT, counted_BT, recursions)[1:]
    agreement_RBT = jnp.ones_like(selected_RBT) if decision_RBT is None else decision_RBT == selected_RBT
    used_T = jnp.any(selected_RBT[-1], axis=0)
    return jax.lax.stop_gradient(
        RoutingStatistics(
            threshold_accuracy_R=jax.vmap(_mean)(agreement_RBT.astype(jnp.float32), active_RBT),
            tokens_per_depth=depth_shares(depth_BT, counted_BT, recursions),
            load_R=load_R,
            dead_token_ratio=1.0 - jnp.mean(used_T.astype(jnp.float32)),
            max_vio=jnp.max(load_R) / jnp.maximum(jnp.mean(load_R), 1e-20) - 1.0,
            entropy=-jnp.sum(jnp.where(load_R > 0, load_R * jnp.log(jnp.maximum(load_R, 1e-20)), 0.0)),
            dropped=_mean((chosen_BT > depth_BT).astype(jnp.float32), counted_BT),
        )
    )


def boundary_decision(config: ModelConfig, raw: jax.Array, recursion: int) -> jax.Array:
    """bool: whether `threshold` lets a token go on at this recursion; capacity 1 lets all (shape of `raw`)."""
    if config.capacities[recursion] == 1.0:
        return jnp.ones(raw.shape, bool)
    boundaries: Any = config.routing.boundaries
    return raw >= (boundaries[recursion] if boundaries is not None else 0.0)


def has_boundary(config: ModelConfig) -> bool:
    """Whether mode `threshold` means something: token-choice, a trained boundary, or a calibrated one."""
    routing = config.routing
    if routing.kind != "expert" or routing.boundaries is not None:
        return True
    return routing.sampling != "none" and not routing.random

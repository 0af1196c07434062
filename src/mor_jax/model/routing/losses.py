"""Router losses and statistics (paper sections 2.2.1 and 3.3, tables 13 and 14).

Pure functions of dense [R, B, T] arrays, so that every execution shares them. Letters: B rows, T positions, R
recursions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model.routing.router import score


@struct.dataclass
class RoutingLosses:
    """Unweighted router losses, float32 scalars; zero where a loss does not apply."""

    sampling: jax.Array
    """Expert-choice: binary cross-entropy of the raw score against "was selected", summed over recursions."""
    aux_router: jax.Array
    """The same of a separate router on detached inputs; trained beside, never part of the total."""
    balancing: jax.Array
    """Token-choice: sum over depths of mean score times N_r x share."""
    router_z: jax.Array
    """Mean squared log-sum-exp of the raw scores."""

    @classmethod
    def zero(cls) -> "RoutingLosses":
        """Losses of a model without a router."""
        zero = jnp.zeros((), jnp.float32)
        return cls(sampling=zero, aux_router=zero, balancing=zero, router_z=zero)


@struct.dataclass
class RoutingStatistics:
    """What to watch while a router trains, float32; measured on this batch."""

    threshold_accuracy_R: jax.Array
    """[R] Expert-choice: share of active tokens that the causal boundary decides as top-k did, per recursion."""
    tokens_per_depth: jax.Array
    """[R + 1] Share of tokens that completed 0, 1, ..., R passes."""
    load_R: jax.Array
    """[R] Share of tokens that the router sends to depths 1..R, drops not counted (what balancing balances)."""
    dead_token_ratio: jax.Array
    """Share of sequence positions that no row of the batch selected in the last recursion."""
    max_vio: jax.Array
    """Largest load over the mean load, minus 1, over the depths 1..R (MaxVio)."""
    entropy: jax.Array
    """Entropy in nats of the loads."""
    dropped: jax.Array
    """Token-choice under `gather`: share of tokens that found no seat and left before their chosen depth."""


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
    if config.routing.sampling == "aux_loss" and not config.routing.random:
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

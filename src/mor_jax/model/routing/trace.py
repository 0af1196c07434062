"""Where every token went: the typed result of routing that travels beside the hidden states (paper section 2.2).

Letters: B rows, T positions, C_r tokens of recursion r, R recursions.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model.routing.decide import RoutingInputs
from mor_jax.model.routing.losses import RoutingLosses, RoutingStatistics, expert_losses, statistics, token_losses


@struct.dataclass
class RoutingTrace:
    """Where every token went. Dense arrays are the same under every execution; zero where a token was not active."""

    depth_BT: jax.Array
    """int32: passes completed by each token, 0..R."""
    active_RBT: jax.Array
    """bool: whether recursion r's router could still choose the token."""
    selected_RBT: jax.Array
    """bool: whether recursion r computed the token."""
    scores_RBT: jax.Array
    """float32 raw router output; token-choice: one per depth."""
    gates_RBT: jax.Array
    """float32 gate of the tokens that recursion r selected (expert) or that left after it (token)."""
    losses: RoutingLosses
    statistics: RoutingStatistics
    selected: tuple[jax.Array, ...] | None = None
    """`topk`: per recursion the positions computed, int32 [B, C_r], ascending; None under `threshold` and for
    token-choice."""

    @property
    def scores(self) -> tuple[jax.Array, ...] | jax.Array:
        """`topk`: per recursion [B, C_{r-1}] the raw scores of the tokens still active; otherwise [B, T, R]."""
        if self.selected is None:
            return jnp.moveaxis(self.scores_RBT, 0, -1)
        first, *others = self.scores_RBT
        rest = zip(others, self.selected[:-1], strict=True)
        return (first, *(jnp.take_along_axis(s, i, axis=1) for s, i in rest))

    @property
    def gates(self) -> tuple[jax.Array, ...] | jax.Array:
        """`topk`: per recursion [B, C_r] the gates of the selected tokens; otherwise [B, T], the gate at exit."""
        if self.selected is None:
            return jnp.sum(self.gates_RBT, axis=0) if self.gates_RBT.shape[0] else self.gates_RBT
        return tuple(jnp.take_along_axis(g, i, axis=1) for g, i in zip(self.gates_RBT, self.selected, strict=True))


@jax.named_scope("routing")
def expert_trace(
    config: ModelConfig,
    inputs: RoutingInputs,
    raw_RBT: jax.Array,
    aux_RBT: jax.Array,
    active_RBT: jax.Array,
    selected_RBT: jax.Array,
    gates_RBT: jax.Array,
) -> RoutingTrace:
    """Assemble the trace of expert-choice from dense arrays."""
    active_RBT, selected_RBT = active_RBT.astype(bool), selected_RBT.astype(bool)
    counted_RBT = active_RBT & inputs.counted_BT[None]
    has_aux = inputs.aux_router is not None
    assert inputs.boundary_R is not None
    compared_RBT = aux_RBT if has_aux else raw_RBT
    depth_BT = jnp.sum(selected_RBT, axis=0, dtype=jnp.int32)
    return RoutingTrace(
        depth_BT=depth_BT,
        active_RBT=active_RBT,
        selected_RBT=selected_RBT,
        scores_RBT=jnp.where(active_RBT, raw_RBT, 0.0),
        gates_RBT=jnp.where(selected_RBT, gates_RBT, 0.0),
        losses=expert_losses(config, raw_RBT, aux_RBT if has_aux else None, counted_RBT, selected_RBT),
        statistics=statistics(
            config,
            depth_BT=depth_BT,
            chosen_BT=depth_BT,
            decision_RBT=compared_RBT >= inputs.boundary_R[:, None, None],
            active_RBT=counted_RBT,
            selected_RBT=selected_RBT,
            counted_BT=inputs.counted_BT,
        ),
    )


@jax.named_scope("routing")
def token_trace(
    config: ModelConfig,
    inputs: RoutingInputs,
    raw_BTR: jax.Array,
    gates_BTR: jax.Array,
    chosen_BT: jax.Array,
    selected_RBT: jax.Array,
) -> RoutingTrace:
    """Assemble the trace of token-choice."""
    depth_BT = jnp.sum(selected_RBT, axis=0, dtype=jnp.int32)
    exits_RBT = depth_BT[None] == 1 + jnp.arange(len(config.capacities))[:, None, None]
    measured = statistics(
        config,
        depth_BT=depth_BT,
        chosen_BT=chosen_BT,
        decision_RBT=None,
        active_RBT=jnp.broadcast_to(inputs.counted_BT[None], selected_RBT.shape),
        selected_RBT=selected_RBT,
        counted_BT=inputs.counted_BT,
    )
    return RoutingTrace(
        depth_BT=depth_BT,
        active_RBT=jnp.concatenate([jnp.ones_like(selected_RBT[:1]), selected_RBT[:-1]]),
        selected_RBT=selected_RBT,
        scores_RBT=jnp.moveaxis(raw_BTR, -1, 0),
        gates_RBT=jnp.where(exits_RBT, jnp.moveaxis(gates_BTR, -1, 0), 0.0),
        losses=token_losses(config, raw_BTR, measured.load_R, inputs.counted_BT),
        statistics=measured,
    )

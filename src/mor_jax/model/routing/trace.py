"""The typed result of routing that travels beside the hidden states (paper section 2.2, tables 13 and 14)."""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.array_types import Array, Float, Int, RowIndex


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

    threshold_accuracy_R: Float[Array, " R"]
    """Expert-choice: share of active tokens that the causal boundary decides as top-k did, per recursion."""
    tokens_per_depth: Float[Array, " R+1"]
    """Share of tokens that completed 0, 1, ..., R passes."""
    load_R: Float[Array, " R"]
    """Share of tokens that the router sends to depths 1..R, drops not counted (what balancing balances)."""
    dead_token_ratio: jax.Array
    """Share of sequence positions that no row of the batch selected in the last recursion."""
    max_vio: jax.Array
    """Largest load over the mean load, minus 1, over the depths 1..R (MaxVio)."""
    entropy: jax.Array
    """Entropy in nats of the loads."""
    dropped: jax.Array
    """Token-choice under `gather`: share of tokens that found no seat and left before their chosen depth."""


@struct.dataclass
class RoutingTrace:
    """Where every token went. Dense arrays are the same under every execution; zero where a token was not active."""

    depth_BT: Int[Array, "B T"]
    """Passes completed by each token, 0..R."""
    active_RBT: jax.Array
    """bool: whether recursion r's router could still choose the token."""
    selected_RBT: jax.Array
    """bool: whether recursion r computed the token."""
    scores_RBT: Float[Array, "R B T"]
    """float32 raw router output; token-choice: one per depth."""
    gates_RBT: Float[Array, "R B T"]
    """float32 gate of the tokens that recursion r selected (expert) or that left after it (token)."""
    losses: RoutingLosses
    statistics: RoutingStatistics
    selected: tuple[RowIndex, ...] | None = None
    """`topk`: per recursion the positions computed, ascending, [B, C_r]; None under `threshold` and token-choice."""

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


@struct.dataclass
class Stages:
    """Hidden states on the way, for parity checks and analysis: float [B, T, D] each."""

    first: jax.Array | None
    """After the unique first layer (middle_* only)."""
    recursions: tuple[jax.Array, ...]
    """After each recursion (after each repeated layer group for sequence sharing)."""
    last: jax.Array | None
    """After the unique last layer (middle_* only)."""
    norm: jax.Array
    """After the final norm."""


@struct.dataclass
class TrunkOutput:
    """Result of the trunk: everything before the output head."""

    hidden_BTD: jax.Array
    """After the final norm, in the compute dtype."""
    trace: RoutingTrace | None
    """None for models without a router."""
    stages: Stages | None = None
    """Present when asked for."""

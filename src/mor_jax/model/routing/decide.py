"""What the executions `gather` and `scan` share: what a recursion is given, and what a router's scores decide.

Paper equations 2.1 (expert-choice) and 2.2 (token-choice). Letters: B rows, T positions, C computed tokens, D width,
R recursions, L layers in the block.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model.layer_context import TokenView
from mor_jax.model.relaxation import Unshared
from mor_jax.model.routing.router import RouterParams, raw_scores, score


@struct.dataclass
class RoutingInputs:
    """What a routed recursion needs beside the hidden states and the block."""

    view: TokenView
    """All T tokens of each row."""
    router: RouterParams
    counted_BT: jax.Array
    """bool: tokens that are not padding; only these compete and count."""
    aux_router: RouterParams | None = None
    unshared: Unshared | None = None
    """What recursions do not share, leaves [R, L, ...]; None if they share everything."""
    boundary_R: jax.Array | None = None
    """float32 [R], expert-choice: of ``boundaries_of``."""
    bias_R: jax.Array | None = None
    """Token-choice, loss-free balancing: added to the scores for choosing only."""
    max_depth: jax.Array | None = None
    """Token-choice: int32 passes that a token may take at most, broadcast over [B, T]; None is all."""
    noise_RBT: jax.Array | None = None
    """Random router: uniform numbers in place of the scores, for choosing and as gates."""
    step: int | jax.Array | None = None
    """0-based optimiser step; None is after every warm-up."""
    slot_multiple: int = struct.field(pytree_node=False, default=1)
    """`gather`: computed lengths are filled up to a multiple of this with slots that hold no selected token."""


def expert_scores(
    config: ModelConfig,
    router: RouterParams,
    aux_router: RouterParams | None,
    x_BCD: jax.Array,
    noise_BC: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Expert-choice: raw scores [B, C] of one recursion's router, and of what learns its boundary (often the same).

    Args:
        config: the model.
        router: of this recursion.
        aux_router: of this recursion; it sees the states, but its gradient does not reach them.
        x_BCD: hidden states of the tokens still active.
        noise_BC: a random router's numbers for them, which are its scores.
    """
    raw_BC = raw_scores(router, x_BCD, config.routing.temperature)[:, :, 0] if noise_BC is None else noise_BC
    if aux_router is None:
        return raw_BC, raw_BC
    return raw_BC, raw_scores(aux_router, jax.lax.stop_gradient(x_BCD))[:, :, 0]


@jax.named_scope("routing")
def best_depth(gates_BTR: jax.Array, bias_R: jax.Array | None, max_depth: jax.Array | None = None) -> jax.Array:
    """Token-choice: the best-scored depth among those allowed, int32 [B, T] of 1..R; ties go to fewer passes.

    Training, evaluation and decoding all decide here.

    Args:
        gates_BTR: of every depth.
        bias_R: added for choosing; None is zeros.
        max_depth: int32, at least 1, broadcast over [B, T]: the cap of each token; None is none.
    """
    ranking_BTR = gates_BTR if bias_R is None else gates_BTR + bias_R[None, None, :]
    if max_depth is not None:
        max_depth_BT1 = jnp.broadcast_to(max_depth, gates_BTR.shape[:2])[:, :, None]
        allowed_BTR = jnp.arange(gates_BTR.shape[-1])[None, None, :] < max_depth_BT1
        ranking_BTR = jnp.where(allowed_BTR, ranking_BTR, -jnp.inf)
    return 1 + jnp.argmax(ranking_BTR, axis=-1).astype(jnp.int32)


@jax.named_scope("routing")
def choose_depth(
    config: ModelConfig, x_BTD: jax.Array, inputs: RoutingInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token-choice: raw scores and gates [B, T, R], and the passes 1..R that each token asks for [B, T]."""
    recursions = config.recursion.num_recursions
    raw_BTR = raw_scores(inputs.router, x_BTD, config.routing.temperature)
    gates_BTR = score(config, raw_BTR)
    chosen_BT = best_depth(gates_BTR, inputs.bias_R, inputs.max_depth)
    if inputs.step is not None and config.routing.balance_warmup_steps:
        warming = jnp.asarray(inputs.step) + 1 < config.routing.balance_warmup_steps
        chosen_BT = jnp.where(warming, recursions, chosen_BT)
    return raw_BTR, gates_BTR, jnp.where(inputs.counted_BT, chosen_BT, 1)

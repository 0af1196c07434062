"""What the executions `gather` and `scan` share: what a recursion is given, and what a router's scores decide.

Paper equations 2.1 (expert-choice) and 2.2 (token-choice). Letters: B rows, T positions, C computed tokens, D width,
R recursions, L layers in the block.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model.layer_context import TokenView
from mor_jax.model.modern_parts import Carried
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
    carried: Carried | None = None
    """Of all T tokens, for the parts that are on."""
    bias_R: jax.Array | None = None
    """Token-choice, loss-free balancing: added to the scores for choosing only."""
    noise_RBT: jax.Array | None = None
    """Random router: uniform numbers that replace the scores for choosing."""
    step: int | jax.Array | None = None
    """0-based optimiser step; None is after every warm-up."""
    slot_multiple: int = struct.field(pytree_node=False, default=1)
    """`gather`: computed lengths are filled up to a multiple of this with slots that hold no selected token."""


def expert_scores(
    config: ModelConfig, router: RouterParams, aux_router: RouterParams | None, x_BCD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Expert-choice: raw scores [B, C] of one recursion's router, and of what learns its boundary (often the same).

    Args:
        config: the model.
        router: of this recursion.
        aux_router: of this recursion; it sees the states, but its gradient does not reach them.
        x_BCD: hidden states of the tokens still active.
    """
    raw_BC = raw_scores(router, x_BCD, config.routing.temperature)[:, :, 0]
    if aux_router is None:
        return raw_BC, raw_BC
    return raw_BC, raw_scores(aux_router, jax.lax.stop_gradient(x_BCD))[:, :, 0]


@jax.named_scope("routing")
def choose_depth(
    config: ModelConfig, x_BTD: jax.Array, inputs: RoutingInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token-choice: raw scores and gates [B, T, R], and the passes 1..R that each token asks for [B, T]."""
    recursions = config.recursion.num_recursions
    raw_BTR = raw_scores(inputs.router, x_BTD, config.routing.temperature)
    gates_BTR = score(config, raw_BTR)
    ranking_BTR = gates_BTR if inputs.bias_R is None else gates_BTR + inputs.bias_R[None, None, :]
    chosen_BT = 1 + jnp.argmax(ranking_BTR, axis=-1).astype(jnp.int32)
    if inputs.step is not None and config.routing.balance_warmup_steps:
        warming = jnp.asarray(inputs.step) + 1 < config.routing.balance_warmup_steps
        chosen_BT = jnp.where(warming, recursions, chosen_BT)
    return raw_BTR, gates_BTR, jnp.where(inputs.counted_BT, chosen_BT, 1)

"""Execution `gather`: each recursion computes only its selected tokens, with static shapes (paper equations 2.1, 2.2).

The selected rows are gathered from the previous recursion's rows, so tensors shrink with depth, and results are put
back from the deepest recursion outwards. Nothing is computed for tokens that have left: compute is saved, not masked.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.model.layer_context import take_tokens
from mor_jax.model.recurse import Block, at, make_context, run_block
from mor_jax.model.routing.capacity import routed_tokens, token_seats
from mor_jax.model.routing.decide import RoutingInputs, choose_depth, expert_scores
from mor_jax.model.routing.hidden_rows import even_slots, gather_hidden, merge_hidden, whole
from mor_jax.model.routing.router import gated, score
from mor_jax.model.routing.select import Selection, gather_rows, scatter_rows, select_mask, select_top, take_rows
from mor_jax.model.routing.trace import RoutingTrace, expert_trace, token_trace


@dataclasses.dataclass
class Descent:
    """Nested selections down to the present recursion, and the way back to whole rows."""

    selections: list[Selection]
    parents: list[jax.Array]

    @jax.named_scope("routing")
    def expand(self, value_BC: jax.Array) -> jax.Array:
        """Put values of the present tokens at their rows: [B, T, ...], zero elsewhere."""
        for selection in reversed(self.selections):
            value_BC = scatter_rows(value_BC, selection)
        return value_BC

    def unwind(self, value_BCD: jax.Array) -> jax.Array:
        """Replace the present tokens' rows in their parents: hidden states of whole rows [B, T, D]."""
        for selection, parent in zip(reversed(self.selections), reversed(self.parents), strict=True):
            value_BCD = merge_hidden(value_BCD, parent, selection)
        return value_BCD

    @jax.named_scope("routing")
    def absolute(self, index_BC: jax.Array) -> Selection:
        """The present tokens as a selection from whole rows, given their row index."""
        mask_BT = self.expand(jnp.ones(index_BC.shape, jnp.float32)).astype(bool)
        slot_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1
        return Selection(index_BC=index_BC, mask_BT=mask_BT, slot_BT=jnp.clip(slot_BT, 0, index_BC.shape[1] - 1))


def _run_block(
    config: ModelConfig,
    block: Block,
    x_BCD: jax.Array,
    inputs: RoutingInputs,
    recursion: int,
    view: TokenView,
    descent: Descent,
    cached: KeyValue | None,
) -> tuple[jax.Array, KeyValue | None]:
    """One pass over the block under the model's key/value strategy."""
    strategy = config.recursion.kv_strategy
    unshared = at(inputs.unshared, recursion)
    if strategy == "recursion" or recursion == 0:
        context = make_context(config, view, keep_kv=strategy != "recursion")
        return run_block(block, x_BCD, context, None, unshared)
    update = descent.absolute(view.rows_BC) if strategy == "shared_update" else None
    context = make_context(config, view, keys=inputs.view, update=update)
    return run_block(block, x_BCD, context, cached, unshared)[0], cached


def expert_gather(
    config: ModelConfig, block: Block, x_BTD: jax.Array, inputs: RoutingInputs, *, return_stages: bool
) -> tuple[jax.Array, RoutingTrace, tuple[jax.Array, ...]]:
    """Expert-choice by top-k: hierarchical selection among the tokens still active.

    Returns:
        Hidden states [B, T, D], the trace, and the hidden states after each recursion if asked for.
    """
    assert inputs.step is None or isinstance(inputs.step, int)
    counts = routed_tokens(config, x_BTD.shape[1], inputs.step)
    shares = config.recursion.kv_strategy != "recursion"
    descent, view, state, cached = Descent([], []), inputs.view, x_BTD, None
    ones_BC, noise, counted = jnp.ones(x_BTD.shape[:2], jnp.float32), inputs.noise_RBT, inputs.counted_BT
    records: list[tuple[jax.Array, ...]] = []
    rows, stages, present = [], [], x_BTD.shape[1]
    for r, count in enumerate(counts):
        raw, aux = expert_scores(config, at(inputs.router, r), at(inputs.aux_router, r), state, at(noise, r))
        active_BT, raw_BT, aux_BT = descent.expand(ones_BC), descent.expand(raw), descent.expand(aux)
        gate, parent, parent_view = score(config, raw), state, view
        if count < present:
            selection = _select(raw, counted, present, count, inputs.slot_multiple)
            descent.selections.append(selection)
            descent.parents.append(state)
            state, gate = gather_hidden(state, selection), gather_rows(gate, selection)
            view = take_tokens(view, selection)
            ones_BC, counted = ones_BC[:, : state.shape[1]], take_rows(counted, selection.index_BC)
            noise = None if noise is None else jax.vmap(lambda n, i=selection.index_BC: take_rows(n, i))(noise)
            present = count
            if shares and r == 0:
                out, cached = _run_block(config, block, parent, inputs, r, parent_view, descent, cached)
                out = gather_hidden(out, selection)
            else:
                out, cached = _run_block(config, block, state, inputs, r, view, descent, cached)
        else:
            out, cached = _run_block(config, block, state, inputs, r, view, descent, cached)
        state = state + gated(config, whole(gate), out, state, inputs.step)
        records.append((raw_BT, aux_BT, active_BT, descent.expand(ones_BC), descent.expand(gate)))
        rows.append(view.rows_BC[:, :count])
        if return_stages:
            stages.append(descent.unwind(state))
    trace = expert_trace(config, inputs, *(jnp.stack(field) for field in zip(*records, strict=True)))
    return descent.unwind(state), dataclasses.replace(trace, selected=tuple(rows)), tuple(stages)


def _select(ranking: jax.Array, counted: jax.Array, present: int, count: int, multiple: int) -> Selection:
    """Choose `count` of the first `present` slots; padding ranks below every token, empty slots below padding."""
    ranking = jnp.where(counted, jax.lax.stop_gradient(ranking), jnp.finfo(jnp.float32).min)
    ranking = jnp.where(jnp.arange(ranking.shape[1])[None, :] < present, ranking, -jnp.inf)
    return select_top(ranking, count, even_slots(count, multiple, ranking.shape[1]))


def token_gather(
    config: ModelConfig, block: Block, x_BTD: jax.Array, inputs: RoutingInputs, *, return_stages: bool
) -> tuple[jax.Array, RoutingTrace, tuple[jax.Array, ...]]:
    """Token-choice with seats: the earliest positions keep them, a dropped token leaves at its last completed depth.

    Returns:
        Hidden states [B, T, D], the trace, and the block's outputs per recursion (zero where not computed) if asked.
    """
    raw_BTR, gates_BTR, chosen_BT = choose_depth(config, x_BTD, inputs)
    warming = inputs.step is not None and inputs.step + 1 < config.routing.balance_warmup_steps
    length = x_BTD.shape[1]
    seats = (length,) * len(config.capacities) if warming else token_seats(config, length)
    descent, view, state, cached = Descent([], []), inputs.view, x_BTD, None
    origin, gates, chosen = x_BTD, gates_BTR, chosen_BT
    valid_BC = jnp.ones(x_BTD.shape[:2], bool)
    deltas: list[jax.Array] = []
    selected, stages = [], []
    for r, count in enumerate(seats):
        if r > 0:
            selection = select_mask(valid_BC & (chosen > r), count, even_slots(count, inputs.slot_multiple, length))
            descent.selections.append(selection)
            slots_C = jnp.arange(selection.index_BC.shape[1])
            valid_BC = slots_C[None, :] < jnp.sum(selection.mask_BT, axis=1, keepdims=True)
            state, origin = gather_hidden(state, selection), gather_hidden(origin, selection)
            gates = gather_rows(gates, selection)
            chosen, view = take_rows(chosen, selection.index_BC), take_tokens(view, selection)
        state, cached = _run_block(config, block, state, inputs, r, view, descent, cached)
        deltas.append(gated(config, whole(gates[:, :, r]), state, origin, inputs.step))
        selected.append(descent.expand(valid_BC.astype(jnp.float32)))
        if return_stages:
            stages.append(descent.expand(state))
    delta = deltas[-1]
    for selection, shallower in zip(reversed(descent.selections), reversed(deltas[:-1]), strict=True):
        delta = merge_hidden(delta, shallower, selection)
    trace = token_trace(config, inputs, raw_BTR, gates_BTR, chosen_BT, jnp.stack(selected).astype(bool))
    return x_BTD + delta, trace, tuple(stages)

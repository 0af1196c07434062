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
from mor_jax.model.recurse import Block, RoutingInputs, at, make_context
from mor_jax.model.routing import router as routing
from mor_jax.model.routing.capacity import routed_tokens, token_seats
from mor_jax.model.routing.hidden_rows import even_slots, gather_hidden, merge_hidden, whole
from mor_jax.model.routing.select import Selection, gather_rows, scatter_rows, select_mask, select_top, take_rows
from mor_jax.model.routing.trace import RoutingTrace


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
    norms = at(inputs.norms, recursion)
    if strategy == "recursion" or recursion == 0:
        context = make_context(config, view, keep_kv=strategy != "recursion")
        return block(x_BCD, context, None, norms)
    update = descent.absolute(view.rows_BC) if strategy == "shared_update" else None
    context = make_context(config, view, keys=inputs.view, update=update)
    return block(x_BCD, context, cached, norms)[0], cached


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
        router_r, aux_r = at(inputs.router, r), at(inputs.aux_router, r)
        raw = routing.raw_scores(router_r, state, config.routing.temperature)[:, :, 0]
        aux = raw if aux_r is None else routing.raw_scores(aux_r, jax.lax.stop_gradient(state))[:, :, 0]
        active_BT, raw_BT, aux_BT = descent.expand(ones_BC), descent.expand(raw), descent.expand(aux)
        gate, parent, parent_view = routing.score(config, raw), state, view
        if count < present:
            selection = _select(raw if noise is None else noise[r], counted, present, count, inputs.slot_multiple)
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
        state = state + routing.gated(config, whole(gate), out, state)
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
    """Assemble the trace of expert-choice from dense arrays (shared by both executions)."""
    active_RBT, selected_RBT = active_RBT.astype(bool), selected_RBT.astype(bool)
    counted_RBT = active_RBT & inputs.counted_BT[None]
    has_aux = inputs.aux_router is not None
    boundary_scores = aux_RBT if has_aux else raw_RBT
    decisions = [routing.boundary_decision(config, s, r) for r, s in enumerate(boundary_scores)]
    depth_BT = jnp.sum(selected_RBT, axis=0, dtype=jnp.int32)
    return RoutingTrace(
        depth_BT=depth_BT,
        active_RBT=active_RBT,
        selected_RBT=selected_RBT,
        scores_RBT=jnp.where(active_RBT, raw_RBT, 0.0),
        gates_RBT=jnp.where(selected_RBT, gates_RBT, 0.0),
        losses=routing.expert_losses(config, raw_RBT, aux_RBT if has_aux else None, counted_RBT, selected_RBT),
        statistics=routing.statistics(
            config,
            depth_BT=depth_BT,
            chosen_BT=depth_BT,
            decision_RBT=jnp.stack(decisions),
            active_RBT=counted_RBT,
            selected_RBT=selected_RBT,
            counted_BT=inputs.counted_BT,
        ),
    )


@jax.named_scope("routing")
def choose_depth(
    config: ModelConfig, x_BTD: jax.Array, inputs: RoutingInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token-choice: raw scores and gates [B, T, R], and the passes 1..R that each token asks for [B, T]."""
    recursions = config.recursion.num_recursions
    raw_BTR = routing.raw_scores(inputs.router, x_BTD, config.routing.temperature)
    gates_BTR = routing.score(config, raw_BTR)
    ranking_BTR = gates_BTR if inputs.bias_R is None else gates_BTR + inputs.bias_R[None, None, :]
    chosen_BT = 1 + jnp.argmax(ranking_BTR, axis=-1).astype(jnp.int32)
    if inputs.step is not None and config.routing.balance_warmup_steps:
        warming = jnp.asarray(inputs.step) + 1 < config.routing.balance_warmup_steps
        chosen_BT = jnp.where(warming, recursions, chosen_BT)
    return raw_BTR, gates_BTR, jnp.where(inputs.counted_BT, chosen_BT, 1)


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
        deltas.append(routing.gated(config, whole(gates[:, :, r]), state, origin))
        selected.append(descent.expand(valid_BC.astype(jnp.float32)))
        if return_stages:
            stages.append(descent.expand(state))
    delta = deltas[-1]
    for selection, shallower in zip(reversed(descent.selections), reversed(deltas[:-1]), strict=True):
        delta = merge_hidden(delta, shallower, selection)
    trace = token_trace(config, inputs, raw_BTR, gates_BTR, chosen_BT, jnp.stack(selected).astype(bool))
    return x_BTD + delta, trace, tuple(stages)


@jax.named_scope("routing")
def token_trace(
    config: ModelConfig,
    inputs: RoutingInputs,
    raw_BTR: jax.Array,
    gates_BTR: jax.Array,
    chosen_BT: jax.Array,
    selected_RBT: jax.Array,
) -> RoutingTrace:
    """Assemble the trace of token-choice (shared by both executions)."""
    depth_BT = jnp.sum(selected_RBT, axis=0, dtype=jnp.int32)
    exits_RBT = depth_BT[None] == 1 + jnp.arange(len(config.capacities))[:, None, None]
    statistics = routing.statistics(
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
        losses=routing.token_losses(config, raw_BTR, statistics.load_R, inputs.counted_BT),
        statistics=statistics,
    )

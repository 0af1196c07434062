"""The two stages of depth-wise continuous batching and the loop that runs them (paper section 3.4, figure 4a).

A *block step* runs the shared block once for C tokens of different sequences that may stand at different recursions. An
*exit step* takes E tokens out of their last pass, through last layer, head and sampling, and their successors in,
through embedding, first layer and router. It runs when `exit_at` tokens wait for it, or when the block would have free
slots; with `exit_at` 1, and for models of one pass, in every step.
All decisions are taken on the device; a dispatch runs many steps. Vanilla models are the case of one pass.

Letters: S places, C block slots, E exit slots, M pages per group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mor_jax.infer.cache import PagedCache, kv_layout, reserve
from mor_jax.infer.decode_layers import DecodeContext, block_pass, decode_context, edge_layer, embed, logits
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_shape import EngineShape
from mor_jax.infer.engine_state import (
    DONE,
    ENTERING,
    LEAVING,
    RUNNING,
    Control,
    Emitted,
    EngineState,
    Slots,
    alternatives_told,
    apply_control,
    choose,
    count,
    hold_state,
    promote,
)
from mor_jax.infer.paged_attention import PagedStore
from mor_jax.infer.sampling import Bias, Extras, Sampled, sample
from mor_jax.infer.walk import Walk, advance, start_walk
from mor_jax.mesh.axes import constrain


@functools.partial(jax.jit, static_argnames="shape", donate_argnums=1)
def dispatch(
    model: DecodeModel, state: EngineState, control: Control, *, shape: EngineShape
) -> tuple[EngineState, jax.Array, jax.Array]:
    """Take the host's wishes and run ``shape.steps`` steps.

    Args:
        model: the model.
        state: donated.
        control: what the host asks for.
        shape: static sizes.

    Returns:
        The state, the tokens generated (packed ``Emitted`` [steps, F, E]), and the sums of ``COUNTERS``.
    """
    state = apply_control(state, control)

    def step(index: jax.Array, carry: tuple[EngineState, jax.Array]) -> tuple[EngineState, jax.Array]:
        state, emitted_XFE = carry
        state = promote(state, shape)
        # the block's pool stays outside of the branches, which might copy it
        cache = state.cache
        rest = dataclasses.replace(state, cache=None)
        leave = lambda rest, edge: _exit_step(model, rest, edge, shape)  # noqa: E731
        if exits_always:
            rest, edge, row_FE = leave(rest, cache.edge)
        else:
            stay = lambda rest, edge: (rest, edge, empty_FE)  # noqa: E731
            rest, edge, row_FE = jax.lax.cond(_exit_is_due(state, shape), leave, stay, rest, cache.edge)
        state = dataclasses.replace(rest, cache=dataclasses.replace(cache, edge=edge))
        state = _block_step(model, state, shape)
        return dataclasses.replace(state, step=state.step + 1), emitted_XFE.at[index].set(row_FE)

    # where there is nothing to decide: a branch would make the host wait for the device in every step
    exits_always = kv_layout(model.config).passes == 1 or shape.exit_at == 1
    empty_FE = Emitted.none(shape.exit_slots, alternatives_told(model, shape)).pack()
    emitted_XFE = jnp.broadcast_to(empty_FE[None], (shape.steps, *empty_FE.shape))
    state, emitted_XFE = jax.lax.fori_loop(0, shape.steps, step, (state, emitted_XFE))
    return hold_state(state), constrain(emitted_XFE), constrain(state.counters_F)


def _exit_is_due(state: EngineState, shape: EngineShape) -> jax.Array:
    exits = jnp.sum((state.phase_S == LEAVING) | (state.phase_S == ENTERING))
    block = jnp.sum(state.phase_S == RUNNING)
    return (exits >= shape.exit_at) | ((exits > 0) & (block < shape.starves_below))


def _take(tree: Walk, place_X: jax.Array) -> Walk:
    return jax.tree.map(lambda leaf_SX: leaf_SX.at[place_X].get(mode="clip"), tree)


def _put(tree: Walk, slots: Slots, rows: Walk, fields: tuple[str, ...]) -> Walk:
    """Store the fields that changed; places in phase `RUNNING` are going, so that is not stored."""
    new = {name: getattr(rows, name) for name in fields}
    old = {name: getattr(tree, name) for name in fields}
    return dataclasses.replace(tree, **jax.tree.map(slots.put, old, new))


def _shares(model: DecodeModel) -> bool:
    """Whether a pass may compute a token that it does not change."""
    return model.config.routing.kind == "expert" and model.config.recursion.kv_strategy == "shared"


def _stored(model: DecodeModel, *more: str) -> tuple[str, ...]:
    """Fields that a stage changes."""
    expert = ("gate_BTR",) if model.config.routing.kind == "expert" else ()
    return ("x_BTD", "recursion_BT", "depth_BT", *expert, *(("applies_BT",) if _shares(model) else ()), *more)


def _token_store(
    cache: PagedCache,
    place_X: jax.Array,
    group_X: jax.Array,
    count_X: jax.Array,
    valid_X: jax.Array,
    shape: EngineShape,
) -> tuple[PagedCache, PagedStore]:
    """Room for one more entry of the groups that get one, and the store through which layers see them."""
    cache, start_X = reserve(cache, place_X, group_X, count_X, 1)
    visible_X = jnp.where(valid_X, start_X + count_X, 0)
    return cache, _store(cache, place_X, group_X, start_X, count_X, visible_X, shape)


def _store(
    cache: PagedCache,
    place_X: jax.Array,
    group_X: jax.Array,
    start_X: jax.Array,
    count_X: jax.Array,
    visible_X: jax.Array,
    shape: EngineShape,
) -> PagedStore:
    places, groups, pages = cache.table_SGM.shape
    return PagedStore(
        table_BM=cache.table_SGM.at[place_X, group_X].get(mode="clip"),
        start_B=start_X,
        count_B=count_X,
        visible_BT=visible_X[:, None],
        page_size=cache.page_size,
        backend=shape.backend,
        table_YM=cache.table_SGM.reshape(-1, pages),
        group_B=jnp.minimum(place_X, places - 1) * groups + group_X,
    )


def _block_step(model: DecodeModel, state: EngineState, shape: EngineShape) -> EngineState:
    slots = choose(state, (RUNNING,), shape.block_slots)
    place_C, valid_C = slots.place_X, slots.filled_X
    walk, groups = _take(state.walk_S, place_C), kv_layout(model.config).groups
    every_C1 = jnp.ones_like(walk.going_BT)
    walk = dataclasses.replace(walk, going_BT=every_C1, applies_BT=walk.applies_BT if _shares(model) else every_C1)
    recursion_C = walk.recursion_BT[:, 0]
    # shared keys and values: recursion 1 writes, later ones read
    writes_C = valid_C & (recursion_C < groups)
    store_groups = jnp.minimum(recursion_C, groups - 1)
    block, store = _token_store(state.cache.block, place_C, store_groups, writes_C.astype(jnp.int32), valid_C, shape)
    position_C1 = state.position_S.at[place_C].get(mode="clip")[:, None]
    context = decode_context(model, position_C1, store)
    out_C1D, block = block_pass(model, block, walk.x_BTD, context, recursion_C)
    walk = advance(model, walk, out_C1D)
    phase_C = jnp.where(walk.going_BT[:, 0], RUNNING, LEAVING)
    entries = jnp.sum(store.visible_BT)
    counters_F = count(state.counters_F, block_steps=1, block_used=jnp.sum(valid_C), block_entries=entries)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, block=block),
        walk_S=_put(state.walk_S, slots, walk, _stored(model)),
        phase_S=slots.put(state.phase_S, phase_C),
        since_S=slots.put(state.since_S, jnp.broadcast_to(state.step, phase_C.shape)),
        counters_F=counters_F,
    )


def _exit_step(
    model: DecodeModel, state: EngineState, edge: PagedCache | None, shape: EngineShape
) -> tuple[EngineState, PagedCache | None, jax.Array]:
    """One exit step on a state without its caches, and the first and last layers' pool."""
    slots = choose(state, (LEAVING, ENTERING), shape.exit_slots)
    place_E, valid_E = slots.place_X, slots.filled_X
    at = lambda leaf_S: leaf_S.at[place_E].get(mode="clip")  # noqa: E731
    leaves_E = valid_E & (at(state.phase_S) == LEAVING)
    edge, token_E, emitted = _leave(model, state, edge, place_E, leaves_E, shape)
    stays_E = valid_E & ~emitted.finished
    position_E = at(state.position_S) + leaves_E
    max_depth_E = at(state.requests.max_depth)
    edge, walk = _enter(model, edge, place_E, stays_E, token_E, position_E, max_depth_E, shape)
    phase_E = jnp.where(stays_E, jnp.where(walk.going_BT[:, 0], RUNNING, LEAVING), DONE)
    entries = jnp.sum(jnp.where(leaves_E, position_E, 0))
    counters_F = count(state.counters_F, exit_steps=1, exit_used=jnp.sum(valid_E), exit_entries=entries)
    token_choice = ("origin_BTD", "gate_BTR") if model.config.routing.kind == "token" else ()
    remaining_S = slots.put(state.requests.remaining, at(state.requests.remaining) - leaves_E)
    state = dataclasses.replace(
        state,
        walk_S=_put(state.walk_S, slots, walk, _stored(model, "limit_BT", *token_choice)),
        phase_S=slots.put(state.phase_S, phase_E),
        since_S=slots.put(state.since_S, jnp.broadcast_to(state.step, phase_E.shape)),
        token_S=slots.put(state.token_S, token_E),
        position_S=slots.put(state.position_S, position_E),
        requests=dataclasses.replace(state.requests, remaining=remaining_S),
        counters_F=counters_F,
    )
    return state, edge, emitted.pack()


def _edge_context(
    model: DecodeModel,
    edge: PagedCache,
    place_E: jax.Array,
    position_E: jax.Array,
    counts_E: jax.Array,
    shape: EngineShape,
) -> DecodeContext:
    """What the first and last layers see: entry number and position are the same, a page holds both layers."""
    visible_E = jnp.where(counts_E > 0, position_E + 1, 0)
    store = _store(edge, place_E, jnp.zeros_like(place_E), position_E, counts_E, visible_E, shape)
    return decode_context(model, position_E[:, None], store)


def _leave(
    model: DecodeModel,
    state: EngineState,
    edge: PagedCache | None,
    place_E: jax.Array,
    leaves_E: jax.Array,
    shape: EngineShape,
) -> tuple[PagedCache | None, jax.Array, Emitted]:
    """Last layer, head and sampling of the tokens that leave; those that enter bring their token along."""
    at = lambda leaf_S: leaf_S.at[place_E].get(mode="clip")  # noqa: E731
    position_E, walk = at(state.position_S), _take(state.walk_S, place_E)
    x_E1D = walk.x_BTD
    if edge is not None:
        context = _edge_context(model, edge, place_E, position_E, leaves_E.astype(jnp.int32), shape)
        x_E1D, edge = edge_layer(model, edge, x_E1D, context, 1)
    sampled = _sample(model, state, logits(model, x_E1D)[:, 0], place_E, leaves_E, shape)
    stops_E = jnp.any(sampled.token_E[:, None] == at(state.requests.stop_tokens), axis=1)
    ends_E = (at(state.requests.remaining) <= 1) | stops_E
    emitted = Emitted(
        place=jnp.where(leaves_E, place_E, -1),
        token=sampled.token_E,
        depth=walk.depth_BT[:, 0],
        log_probability=sampled.log_probability_E,
        finished=leaves_E & ends_E,
        alternatives=sampled.alternatives,
    )
    return edge, jnp.where(leaves_E, sampled.token_E, at(state.token_S)), emitted


def _sample(
    model: DecodeModel,
    state: EngineState,
    logits_EV: jax.Array,
    place_E: jax.Array,
    leaves_E: jax.Array,
    shape: EngineShape,
) -> Sampled:
    requests = jax.tree.map(lambda leaf_S: leaf_S.at[place_E].get(mode="clip"), state.requests)
    # nobody reads what the others would draw, and a cut of theirs would sort the vocabulary
    temperature_E = jnp.where(leaves_E, requests.sampling.temperature_E, 0.0)
    extras = None
    if shape.cuts:
        bias = jax.tree.map(lambda leaf_SK: leaf_SK.at[place_E].get(mode="clip"), state.bias)
        must_go_on_E = requests.remaining > requests.stops_at
        token_EK = jnp.where(requests.has_bias[:, None], bias.token_EK, -1)
        banned_EK = jnp.where(must_go_on_E[:, None], requests.stop_tokens, -1)
        forbidden_EK = jnp.full(banned_EK.shape, -jnp.inf)
        both = Bias(jnp.concatenate([token_EK, banned_EK], 1), jnp.concatenate([bias.value_EK, forbidden_EK], 1))
        extras = Extras(both, leaves_E & (requests.has_bias | requests.has_alternatives | must_go_on_E))
    return sample(
        logits_EV,
        dataclasses.replace(requests.sampling, temperature_E=temperature_E),
        state.position_S.at[place_E].get(mode="clip"),
        known_tokens=model.known_tokens,
        cuts=shape.cuts,
        extras=extras,
    )


def _enter(
    model: DecodeModel,
    edge: PagedCache | None,
    place_E: jax.Array,
    stays_E: jax.Array,
    token_E: jax.Array,
    position_E: jax.Array,
    max_depth_E: jax.Array,
    shape: EngineShape,
) -> tuple[PagedCache | None, Walk]:
    """Embedding and first layer of the next token, and the decision before its first pass."""
    x_E1D = embed(model, token_E[:, None])
    if edge is not None:
        counts_E = stays_E.astype(jnp.int32)
        edge, _ = reserve(edge, place_E, jnp.zeros_like(place_E), counts_E, 1)
        context = _edge_context(model, edge, place_E, position_E, counts_E, shape)
        x_E1D, edge = edge_layer(model, edge, x_E1D, context, 0)
    return edge, start_walk(model, x_E1D, max_depth_E[:, None])

"""What the engine keeps on the device: the places of sequences, their caches, and what the host asks for.

Letters: S places, C block slots, E exit slots, D width, K tokens with a bias, or most likely ones.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.data.special_tokens import MOST_STOP_IDS
from mor_jax.infer.cache import Cache, hold_cache, init_cache
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_shape import EngineShape
from mor_jax.infer.sampling import MOST_ALTERNATIVES, MOST_BIASES, Alternatives, Bias, SamplingRows
from mor_jax.infer.walk import Walk, start_walk
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.mesh import on_mesh

AnyArray = Any
"""An array of the device, or of the host before it is handed over."""
FREE, WAITING, ENTERING, RUNNING, LEAVING, DONE = range(6)
"""Phases of a place: empty, or being filled by a prompt; read and waiting for its turn; a token before its first layer;
between two passes of the block; behind its last pass; finished, its pages not yet given back."""


@struct.dataclass
class Requests:
    """What each place's request asks for, [S] where nothing else is said."""

    order: AnyArray
    """int32: waiting requests start by it, ascending."""
    remaining: AnyArray
    """int32: tokens still to generate."""
    stop_tokens: AnyArray
    """int32 [S, MOST_STOP_IDS]: tokens that end it; -1 is none."""
    max_depth: AnyArray
    """int32: budget of passes per token."""
    stops_at: AnyArray
    """int32: while more tokens than that remain, no stop token is chosen."""
    has_bias: AnyArray
    """bool: whether ``EngineState.bias`` is its own."""
    has_alternatives: AnyArray
    """bool: whether it is told the most likely tokens."""
    sampling: SamplingRows


COUNTERS = ("block_steps", "block_used", "block_entries", "exit_steps", "exit_used", "exit_entries")
"""What a dispatch counts: passes over the block, slots of them that held a token, and cache entries that these attended
to in each layer of the block; likewise exit steps, with the last layer's entries."""


def count(counters_F: jax.Array, **more: jax.Array | int) -> jax.Array:
    """Add to some of ``COUNTERS``; they are one array, so that it takes one kernel."""
    return counters_F + jnp.stack([jnp.asarray(more.get(name, 0), jnp.int32) for name in COUNTERS])


@struct.dataclass
class EngineState:
    """Everything on the device but the weights."""

    cache: Cache
    phase_S: jax.Array
    """int32: ``FREE`` to ``DONE``."""
    since_S: jax.Array
    """int32: step at which the place began to wait for its stage; the oldest goes first."""
    token_S: jax.Array
    """int32: the token being computed."""
    position_S: jax.Array
    """int32: its position."""
    walk_S: Walk
    """Its way through the recursions, [S, 1, ...]."""
    requests: Requests
    bias: Bias
    """[S, MOST_BIASES]; no part of the requests, which are handed over with every dispatch: see ``put_bias``."""
    step: jax.Array
    counters_F: jax.Array
    """int32 [F]: sums since the last dispatch began; see ``COUNTERS``."""


@struct.dataclass
class Control:
    """What the host asks for between two dispatches, all [S]."""

    admit: AnyArray
    """bool: its prompt, but for the last token, has been read; it may start."""
    token: AnyArray
    """int32: last token of the prompt."""
    position: AnyArray
    """int32: its position."""
    requests: Requests


@struct.dataclass
class Emitted:
    """Tokens that one exit step generated, [E]; a dispatch packs those of all its steps."""

    place: jax.Array
    """int32; -1 is no token."""
    token: jax.Array
    depth: jax.Array
    """int32: passes completed by the token that this one follows."""
    log_probability: jax.Array
    finished: jax.Array
    """bool: whether it is its request's last."""
    alternatives: Alternatives
    """[E, K]."""

    @classmethod
    def none(cls, slots: int, alternatives: int = 0) -> "Emitted":
        """No tokens."""
        whole, ranked = jnp.zeros(slots, jnp.int32), jnp.zeros((slots, alternatives), jnp.int32)
        found = Alternatives(ranked, ranked.astype(jnp.float32))
        return cls(whole - 1, whole, whole, jnp.zeros(slots, jnp.float32), jnp.zeros(slots, bool), found)

    def pack(self) -> jax.Array:
        """All fields as int32 [F, E]: one write and one transfer."""
        bits = jax.lax.bitcast_convert_type(self.log_probability, jnp.int32)
        plain = jnp.stack([self.place, self.token, self.depth, bits, self.finished.astype(jnp.int32)])
        return jnp.concatenate([plain, pack_alternatives(self.alternatives).T])

    @classmethod
    def unpack(cls, packed_XFE: np.ndarray) -> "Emitted":
        """Fields [steps, E] on the host."""
        packed_FXE = np.moveaxis(packed_XFE, 1, 0)
        place, token, depth, bits, finished = packed_FXE[:5]
        bits = np.ascontiguousarray(bits).view(np.float32)
        ranked = unpack_alternatives(np.moveaxis(packed_FXE[5:], 0, -1))
        return cls(place, token, depth, bits, finished.astype(bool), ranked)  # type: ignore[arg-type]

    def where(self, chosen: np.ndarray) -> "Emitted":
        """Those that a bool [steps, E] chooses, on the host, [N] in order of the steps."""
        return jax.tree.map(lambda field: field[chosen], self)


def pack_alternatives(found: Alternatives) -> jax.Array:
    """Both fields as int32 [..., 2 K]."""
    bits = jax.lax.bitcast_convert_type(found.log_probability, jnp.int32)
    return jnp.concatenate([found.token, bits], axis=-1)


def unpack_alternatives(packed: np.ndarray) -> Any:
    """The fields again, on the host."""
    token, bits = np.split(packed, 2, axis=-1)
    return Alternatives(token, np.ascontiguousarray(bits).view(np.float32))  # type: ignore[arg-type]


@functools.partial(jax.jit, donate_argnums=0)
def put_bias(bias: Bias, place: jax.Array, token_K: jax.Array, value_K: jax.Array) -> Bias:
    """Store the bias of one place (``MOST_BIASES`` tokens, -1 is none); a place that there is not changes nothing."""
    put = lambda leaf_SK, row_K: constrain(leaf_SK.at[place].set(row_K, mode="drop"))  # noqa: E731
    return Bias(put(bias.token_EK, token_K), put(bias.value_EK, value_K))


def bias_rows(logit_bias: tuple[tuple[int, float], ...]) -> tuple[np.ndarray, np.ndarray]:
    """A request's bias as rows for ``put_bias``."""
    token_K, value_K = np.full(MOST_BIASES, -1, np.int32), np.zeros(MOST_BIASES, np.float32)
    for nth, (token, value) in enumerate(logit_bias):
        token_K[nth], value_K[nth] = token, value
    return token_K, value_K


def alternatives_told(model: DecodeModel, shape: EngineShape) -> int:
    """Most likely tokens that come with every token."""
    return min(MOST_ALTERNATIVES, model.config.vocab_size) if shape.cuts else 0


def init_state(model: DecodeModel, shape: EngineShape) -> EngineState:
    """Make an empty engine."""
    places = shape.places
    zeros_S = np.zeros(places, np.int32)
    x_SD = jnp.zeros((places, 1, model.config.d_model), model.config.dtype)
    return EngineState(
        cache=init_cache(model.config, shape.cache),
        phase_S=jnp.asarray(zeros_S),
        since_S=jnp.asarray(zeros_S),
        token_S=jnp.asarray(zeros_S),
        position_S=jnp.asarray(zeros_S),
        walk_S=jax.jit(start_walk)(model, x_SD, jnp.ones((places, 1), jnp.int32)),
        requests=jax.tree.map(jnp.asarray, empty_requests(places)),
        bias=Bias(jnp.full((places, MOST_BIASES), -1, jnp.int32), jnp.zeros((places, MOST_BIASES), jnp.float32)),
        step=jnp.zeros((), jnp.int32),
        counters_F=jnp.zeros(len(COUNTERS), jnp.int32),
    )


def hold_state(state: EngineState) -> EngineState:
    """Keep the state on the devices as ``init_state`` laid it out: whole on each of them, but for the pools' heads."""
    return dataclasses.replace(jax.tree.map(constrain, state), cache=hold_cache(state.cache))


def make_state(model: DecodeModel, shape: EngineShape) -> EngineState:
    """``init_state`` on the devices of the model; the pools are made as their shards."""
    if model.mesh is None:
        return init_state(model, shape)
    with on_mesh(model.mesh):
        return jax.jit(lambda model: hold_state(init_state(model, shape)))(model)


def empty_requests(places: int) -> Requests:
    """Requests of nothing, as arrays of the host."""
    zeros = lambda: np.zeros(places, np.int32)  # noqa: E731
    zero_floats = lambda: np.zeros(places, np.float32)  # noqa: E731
    rows = SamplingRows(zero_floats(), zeros(), zero_floats(), np.zeros(places, np.uint32))
    no_flags = lambda: np.zeros(places, bool)  # noqa: E731
    stops = np.full((places, MOST_STOP_IDS), -1, np.int32)
    return Requests(zeros(), zeros(), stops, zeros(), zeros(), no_flags(), no_flags(), rows)


def empty_control(places: int) -> Control:
    """A control that asks for nothing."""
    no_flags = lambda: np.zeros(places, bool)  # noqa: E731
    zeros = lambda: np.zeros(places, np.int32)  # noqa: E731
    return Control(no_flags(), zeros(), zeros(), empty_requests(places))


def apply_control(state: EngineState, control: Control) -> EngineState:
    """Let new requests wait for their turn."""
    admit = lambda leaf: jnp.asarray(control.admit).reshape(-1, *(1,) * (leaf.ndim - 1))  # noqa: E731
    take = lambda new, old: jnp.where(admit(old), new, old)  # noqa: E731
    return dataclasses.replace(
        state,
        phase_S=take(WAITING, state.phase_S),
        token_S=take(control.token, state.token_S),
        position_S=take(control.position, state.position_S),
        requests=jax.tree.map(take, control.requests, state.requests),
        counters_F=jnp.zeros(len(COUNTERS), jnp.int32),
    )


def ranks(waits_S: jax.Array, key_S: jax.Array) -> jax.Array:
    """int32 [S]: how many others wait with a smaller key (ties: a lower place). One comparison of all pairs."""
    nth_S = jnp.arange(key_S.shape[0])
    less_SS = key_S[None, :] < key_S[:, None]
    ties_SS = (key_S[None, :] == key_S[:, None]) & (nth_S[None, :] < nth_S[:, None])
    return jnp.sum(waits_S[None, :] & (less_SS | ties_SS), axis=1, dtype=jnp.int32)


def is_running(phase_S: jax.Array) -> jax.Array:
    """bool [S]: places that count towards ``max_running``."""
    return (phase_S > WAITING) & (phase_S < DONE)


def promote(state: EngineState, shape: EngineShape) -> EngineState:
    """Start waiting requests while fewer than ``max_running`` run."""
    waits_S = state.phase_S == WAITING
    running = jnp.sum(is_running(state.phase_S))
    starts_S = waits_S & (ranks(waits_S, state.requests.order) < shape.max_running - running)
    return dataclasses.replace(
        state,
        phase_S=jnp.where(starts_S, ENTERING, state.phase_S),
        since_S=jnp.where(starts_S, state.step, state.since_S),
    )


@struct.dataclass
class Slots:
    """Which places fill the slots of a stage."""

    place_X: jax.Array
    """int32 [slots]; S where a slot is empty, which gathers clip."""
    slot_S: jax.Array
    """int32 [S]: the slot of each place; the number of slots where it has none."""

    @property
    def filled_X(self) -> jax.Array:
        """bool [slots]."""
        return self.place_X < self.slot_S.shape[0]

    def put(self, leaf_S: jax.Array, row_X: jax.Array) -> jax.Array:
        """Replace the rows of the places that have a slot.

        A choice per place instead of a scatter per slot: XLA computes many of them in one kernel.
        """
        slots = self.place_X.shape[0]
        has_S = (self.slot_S < slots).reshape(-1, *(1,) * (leaf_S.ndim - 1))
        return jnp.where(has_S, row_X.astype(leaf_S.dtype).at[self.slot_S].get(mode="clip"), leaf_S)


def choose(state: EngineState, phases: tuple[int, ...], slots: int) -> Slots:
    """Fill slots with the places in some phases that have waited longest."""
    places = state.phase_S.shape[0]
    waits_S = functools.reduce(jnp.logical_or, [state.phase_S == phase for phase in phases])
    # differences are right also after the count of steps, an int32, has begun anew
    slot_S = jnp.minimum(jnp.where(waits_S, ranks(waits_S, state.since_S - state.step), slots), slots)
    holds_XS = slot_S[None, :] == jnp.arange(slots)[:, None]
    filled_X = jnp.any(holds_XS, axis=1)
    place_X = jnp.where(filled_X, jnp.argmax(holds_XS, axis=1).astype(jnp.int32), places)
    return Slots(place_X, slot_S)

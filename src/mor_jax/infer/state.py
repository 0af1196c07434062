"""What the engine keeps on the device: the places of sequences, their caches, and what the host asks for.

Letters: S places, C block slots, E exit slots, D width.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.errors import require
from mor_jax.infer.attention import DecodeBackend
from mor_jax.infer.cache import Cache, CacheShape, init_cache, release_all
from mor_jax.infer.sampling import SamplingRows
from mor_jax.infer.walk import Walk, start_walk
from mor_jax.infer.weights import DecodeModel

AnyArray = Any
"""An array of the device, or of the host before it is handed over."""
FREE, WAITING, ENTERING, RUNNING, LEAVING, DONE = range(6)
"""Phases of a place: empty, or being filled by a prompt; read and waiting for its turn; a token before its first layer;
between two passes of the block; behind its last pass; finished, its pages not yet given back."""


@dataclass(frozen=True)
class EngineShape:
    """Static sizes of the engine; nothing recompiles while they stay."""

    max_running: int
    """Sequences decoded at the same time."""
    block_slots: int
    """C: tokens that one pass over the block computes."""
    exit_slots: int
    """E: tokens that leave together through last layer, head, sampling, embedding and first layer."""
    exit_at: int
    """Tokens that make an exit step due."""
    places: int
    """S: sequences that hold pages: those decoded, and those whose prompt is read and that wait."""
    max_length: int
    """Tokens of one sequence, prompt and completion."""
    steps: int = 16
    """Block passes per dispatch: the host looks in between."""
    page_size: int = 16
    """Cache entries per page."""
    block_pages: int | None = None
    """See ``CacheShape``."""
    edge_pages: int | None = None
    """See ``CacheShape``."""
    backend: DecodeBackend = "xla"
    """Decode attention, resolved."""

    def __post_init__(self) -> None:
        for name in ("max_running", "block_slots", "exit_slots", "exit_at", "max_length", "steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.places >= self.max_running, f"places={self.places} is fewer than max_running={self.max_running}")

    @property
    def starves_below(self) -> int:
        """Tokens between passes below which an exit step is due too: the block would have free slots."""
        return max(1, min(self.block_slots, self.max_running - self.exit_at))

    @property
    def cache(self) -> CacheShape:
        """Sizes of the cache."""
        return CacheShape(self.places, self.max_length, self.page_size, self.block_pages, self.edge_pages)


@struct.dataclass
class Requests:
    """What each place's request asks for, all [S]."""

    order: AnyArray
    """int32: waiting requests start by it, ascending."""
    remaining: AnyArray
    """int32: tokens still to generate."""
    stop_token: AnyArray
    """int32: token that ends it; -1 is none."""
    max_depth: AnyArray
    """int32: budget of passes per token."""
    sampling: SamplingRows


@struct.dataclass
class Counters:
    """int32 sums since the last dispatch began."""

    block_steps: jax.Array
    """Passes over the block."""
    block_used: jax.Array
    """Slots of them that held a token."""
    block_entries: jax.Array
    """Cache entries that they attended to, in each layer of the block."""
    exit_steps: jax.Array
    exit_used: jax.Array
    exit_entries: jax.Array
    """Cache entries that the last layer attended to."""

    @classmethod
    def zero(cls) -> "Counters":
        """All 0."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in dataclasses.fields(cls)))


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
    step: jax.Array
    counters: Counters


@struct.dataclass
class Control:
    """What the host asks for between two dispatches, all [S]."""

    cancel: AnyArray
    """bool: empty the place."""
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

    @classmethod
    def none(cls, slots: int) -> "Emitted":
        """No tokens."""
        whole = jnp.zeros(slots, jnp.int32)
        return cls(whole - 1, whole, whole, jnp.zeros(slots, jnp.float32), jnp.zeros(slots, bool))

    def pack(self) -> jax.Array:
        """All fields as int32 [F, E]: one write and one transfer."""
        bits = jax.lax.bitcast_convert_type(self.log_probability, jnp.int32)
        return jnp.stack([self.place, self.token, self.depth, bits, self.finished.astype(jnp.int32)])

    @classmethod
    def unpack(cls, packed_XFE: np.ndarray) -> "Emitted":
        """Fields [steps, E] on the host."""
        place, token, depth, bits, finished = np.moveaxis(packed_XFE, 1, 0)
        bits = np.ascontiguousarray(bits).view(np.float32)
        return cls(place, token, depth, bits, finished.astype(bool))  # type: ignore[arg-type]


def init_state(model: DecodeModel, shape: EngineShape) -> EngineState:
    """Make an empty engine."""
    places = shape.places
    whole_S = np.zeros(places, np.int32)
    x_SD = jnp.zeros((places, 1, model.config.d_model), model.config.dtype)
    return EngineState(
        cache=init_cache(model.config, shape.cache),
        phase_S=jnp.asarray(whole_S),
        since_S=jnp.asarray(whole_S),
        token_S=jnp.asarray(whole_S),
        position_S=jnp.asarray(whole_S),
        walk_S=jax.jit(start_walk)(model, x_SD, jnp.ones((places, 1), jnp.int32)),
        requests=jax.tree.map(jnp.asarray, empty_requests(places)),
        step=jnp.zeros((), jnp.int32),
        counters=Counters.zero(),
    )


def empty_requests(places: int) -> Requests:
    """Requests of nothing, as arrays of the host."""
    whole = lambda: np.zeros(places, np.int32)  # noqa: E731
    number = lambda: np.zeros(places, np.float32)  # noqa: E731
    rows = SamplingRows(number(), whole(), number(), np.zeros(places, np.uint32))
    return Requests(order=whole(), remaining=whole(), stop_token=whole(), max_depth=whole(), sampling=rows)


def empty_control(places: int) -> Control:
    """A control that asks for nothing."""
    flag = lambda: np.zeros(places, bool)  # noqa: E731
    whole = lambda: np.zeros(places, np.int32)  # noqa: E731
    return Control(flag(), flag(), whole(), whole(), empty_requests(places))


def apply_control(state: EngineState, control: Control) -> EngineState:
    """Give back what finished or was cancelled, and let new requests wait for their turn."""
    emptied_S = control.cancel | (state.phase_S == DONE)
    phase_S = jnp.where(emptied_S, FREE, state.phase_S)
    take = lambda new, old: jnp.where(control.admit, new, old)  # noqa: E731
    return dataclasses.replace(
        state,
        cache=release_all(state.cache, jnp.asarray(emptied_S)),
        phase_S=take(WAITING, phase_S),
        token_S=take(control.token, state.token_S),
        position_S=take(control.position, state.position_S),
        requests=jax.tree.map(take, control.requests, state.requests),
        counters=Counters.zero(),
    )


def ranks(waits_S: jax.Array, key_S: jax.Array) -> jax.Array:
    """int32 [S]: how many others wait with a smaller key (ties: a lower place). One comparison of all pairs."""
    nth_S = jnp.arange(key_S.shape[0])
    less_SS = key_S[None, :] < key_S[:, None]
    ties_SS = (key_S[None, :] == key_S[:, None]) & (nth_S[None, :] < nth_S[:, None])
    return jnp.sum(waits_S[None, :] & (less_SS | ties_SS), axis=1, dtype=jnp.int32)


def choose(waits_S: jax.Array, since_S: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Fill slots with the places that have waited longest.

    Returns:
        int32 [slots] places, and bool [slots] whether a slot is filled; the others hold S, which writes drop.
    """
    places = waits_S.shape[0]
    rank_S = jnp.where(waits_S, ranks(waits_S, since_S), places)
    holds_XS = rank_S[None, :] == jnp.arange(slots)[:, None]
    filled_X = jnp.any(holds_XS, axis=1)
    return jnp.where(filled_X, jnp.argmax(holds_XS, axis=1).astype(jnp.int32), places), filled_X

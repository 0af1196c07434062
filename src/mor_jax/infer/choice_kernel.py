"""Which places fill the slots of a stage, as one GPU kernel of one program instead of XLA's four or five.

The same as ``state.promote`` and ``state.choose``, which run everywhere and are what this is tested against.
Letters: S places, X slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mor_jax.infer.engine_state import ENTERING, WAITING, EngineState, Slots, is_running

MAX_PLACES = 256
"""All pairs of places are compared in registers."""


def _ranks(waits_S: jax.Array, key_S: jax.Array) -> jax.Array:
    """int32 [S]: how many others wait with a smaller key (ties: a lower place)."""
    nth_S = jnp.arange(key_S.shape[0], dtype=jnp.int32)
    ties_SS = (key_S[None, :] == key_S[:, None]) & (nth_S[None, :] < nth_S[:, None])
    before_SS = waits_S[None, :] & ((key_S[None, :] < key_S[:, None]) | ties_SS)
    return jnp.sum(before_SS.astype(jnp.int32), axis=1)


def _kernel(
    phase_ref: Any,
    since_ref: Any,
    order_ref: Any,
    step_ref: Any,
    place_ref: Any,
    slot_ref: Any,
    new_phase_ref: Any,
    new_since_ref: Any,
    *,
    sizes: tuple[int, int],
    phases: tuple[int, ...],
    max_running: int,
) -> None:
    places, slots = sizes
    nth_S = jnp.arange(_power_of_two(places), dtype=jnp.int32)
    inside_S = nth_S < places
    load = lambda ref: plgpu.load(ref.at[nth_S], mask=inside_S, other=0)  # noqa: E731  # 0 is FREE
    phase_S, since_S = load(phase_ref), load(since_ref)
    if max_running:
        waits_S, running = phase_S == WAITING, jnp.sum(is_running(phase_S).astype(jnp.int32))
        starts_S = waits_S & (_ranks(waits_S, load(order_ref)) < max_running - running)
        phase_S = jnp.where(starts_S, ENTERING, phase_S)
        since_S = jnp.where(starts_S, step_ref[...], since_S)
    plgpu.store(new_phase_ref.at[nth_S], phase_S, mask=inside_S)
    plgpu.store(new_since_ref.at[nth_S], since_S, mask=inside_S)
    waits_S = functools.reduce(jnp.logical_or, [phase_S == phase for phase in phases])
    slot_S = jnp.where(waits_S, jnp.minimum(_ranks(waits_S, since_S - step_ref[...]), slots), slots)
    plgpu.store(slot_ref.at[nth_S], slot_S, mask=inside_S)
    nth_X = jnp.arange(_power_of_two(slots), dtype=jnp.int32)
    holds_XS = slot_S[None, :] == nth_X[:, None]
    # one place at most has a slot, so a sum finds it; empty slots name the place behind the last
    place_X = places + jnp.sum(jnp.where(holds_XS, nth_S[None, :] - places, 0), axis=1)
    plgpu.store(place_ref.at[nth_X], place_X, mask=nth_X < slots)


def _power_of_two(size: int) -> int:
    return 1 << max(4, (size - 1).bit_length())


def choose_places(
    state: EngineState, phases: tuple[int, ...], slots: int, *, max_running: int = 0, interpret: bool = False
) -> tuple[jax.Array, jax.Array, Slots]:
    """Fill slots with the places in some phases that have waited longest.

    Args:
        state: the engine's.
        phases: of the places that want a slot.
        slots: how many there are.
        max_running: start waiting requests first while fewer run; 0 starts none.
        interpret: run the kernel's program on the CPU, to test it.

    Returns:
        ``phase_S`` and ``since_S`` after the start, and the slots.
    """
    places = state.phase_S.shape[0]
    assert places <= MAX_PLACES
    whole_S, whole_X = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (places, slots))
    place_X, slot_S, phase_S, since_S = pl.pallas_call(
        functools.partial(_kernel, sizes=(places, slots), phases=phases, max_running=max_running),
        grid=(1,),
        out_shape=[whole_X, whole_S, whole_S, whole_S],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="choose_places",
    )(state.phase_S, state.since_S, state.requests.order, state.step)
    return phase_S, since_S, Slots(place_X, slot_S)

"""Which waiting requests start, and which places fill a stage's slots: those that have waited longest."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from mor_jax.infer.engine_state import ENTERING, LEAVING, RUNNING, WAITING, EngineState, choose, promote


def _state(phase_S: Any, since_S: Any, order_S: Any, step: int) -> Any:
    """An engine's state as far as a choice sees it."""
    phase_S, since_S, order_S = (jnp.asarray(x, jnp.int32) for x in (phase_S, since_S, order_S))
    absent: Any = None
    requests: Any = SimpleNamespace(order=order_S)
    step_ = jnp.asarray(step, jnp.int32)
    return EngineState(absent, phase_S, since_S, absent, absent, absent, requests, absent, step_, absent)


@pytest.mark.parametrize(
    ("slots", "places", "slot_of"),
    [
        (1, [3], [1, 1, 1, 0, 1]),
        (3, [3, 0, 2], [1, 3, 2, 0, 3]),  # of two that waited equally long the one in the lower place
        (5, [3, 0, 2, 5, 5], [1, 5, 2, 0, 5]),
    ],
)
def test_the_longest_waiting_of_the_phases_fill_the_slots(slots, places, slot_of):
    state = _state([LEAVING, RUNNING, ENTERING, ENTERING, WAITING], [4, 0, 4, 2, 1], range(5), 9)
    chosen = choose(state, (LEAVING, ENTERING), slots)
    assert chosen.place_X.tolist() == places and chosen.slot_S.tolist() == slot_of


def test_the_longest_waiting_goes_first_also_when_the_steps_have_begun_anew():
    least, most = -(2**31), 2**31 - 1
    state = _state([RUNNING] * 4, [least, most, least + 1, most - 1], range(4), least + 2)
    assert choose(state, (RUNNING,), 3).place_X.tolist() == [3, 1, 0]


def test_requests_start_in_order_while_fewer_than_the_most_run():
    state = _state([WAITING, RUNNING, WAITING, WAITING, LEAVING], [0] * 5, [7, 1, 5, 6, 2], 9)
    for most, starts in ((2, []), (3, [2]), (4, [2, 3]), (9, [0, 2, 3])):
        shape: Any = SimpleNamespace(max_running=most)
        after = promote(state, shape)
        assert [i for i in range(5) if after.phase_S[i] == ENTERING] == starts
        assert [i for i in range(5) if after.since_S[i] == 9] == starts

"""Which places fill a stage's slots: the longest waiting ones, by the plain path and by the kernel, interpreted."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.infer.engine_state import DONE, ENTERING, LEAVING, RUNNING, EngineState
from mor_jax.infer.stages import _choose


def _state(phase_S: Any, since_S: Any, order_S: Any, step: int) -> Any:
    """An engine's state as far as a choice sees it."""
    phase_S, since_S, order_S = (jnp.asarray(x, jnp.int32) for x in (phase_S, since_S, order_S))
    absent: Any = None
    requests: Any = SimpleNamespace(order=order_S)
    return EngineState(absent, phase_S, since_S, absent, absent, absent, requests, jnp.asarray(step, jnp.int32), absent)


def _both(state: Any, phases: tuple[int, ...], slots: int, *, promotes: bool = False) -> list[Any]:
    """(phases, since, place of each slot, slot of each place) by either path."""
    found = []
    for products in ("xla", "pallas"):
        shape: Any = SimpleNamespace(products=products, places=state.phase_S.size, max_running=3)
        after, chosen = _choose(state, phases, slots, shape, promotes=promotes)
        found.append([np.asarray(x) for x in (after.phase_S, after.since_S, chosen.place_X, chosen.slot_S)])
    return found


@pytest.mark.parametrize(("places", "slots"), [(1, 1), (5, 3), (17, 20)])
def test_the_kernel_chooses_as_the_plain_path(places, slots):
    rng = np.random.default_rng(0)
    for promotes in (False, True, True):
        state = _state(rng.integers(0, DONE + 1, places), rng.integers(0, 4, places), rng.permutation(places), 9)
        for one, other in zip(*_both(state, (LEAVING, ENTERING), slots, promotes=promotes), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_longest_waiting_goes_first_also_when_the_steps_have_begun_anew():
    least, most = -(2**31), 2**31 - 1
    state = _state([RUNNING] * 4, [least, most, least + 1, most - 1], range(4), least + 2)
    for _, _, place_X, _ in _both(state, (RUNNING,), 3):
        assert place_X.tolist() == [3, 1, 0]

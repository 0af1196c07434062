"""The k-th highest score by counting, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model.routing.ranks import kth_highest, ordered, score_of
from mor_jax.model.routing.select import select_top


@pytest.mark.parametrize("count", [1, 3, 64])
def test_kth_highest_is_what_a_sort_finds(count):
    scores_BT = np.round(np.random.default_rng(0).normal(size=(4, 64)), 1).astype(np.float32)  # ties
    scores_BT[:, 5] = -np.inf
    wanted_B = np.sort(scores_BT, axis=1)[:, -count]
    found_B1 = score_of(kth_highest(ordered(jnp.asarray(scores_BT)), count, axis=1))
    np.testing.assert_array_equal(found_B1[:, 0] + 0.0, wanted_B + 0.0)
    assert (
        float(score_of(kth_highest(ordered(jnp.asarray(scores_BT)), count))[0, 0]) == np.sort(scores_BT, None)[-count]
    )


def test_selection_equals_top_k_and_slots_left_over_hold_unselected_rows():
    scores_BT = jax.random.normal(jax.random.key(0), (3, 50)).at[:, 10:30].set(0.5)
    selection = select_top(scores_BT, 21, 24)
    wanted_BC = np.sort(jax.lax.top_k(scores_BT, 21)[1], axis=1)
    np.testing.assert_array_equal(selection.index_BC[:, :21], wanted_BC)
    assert not np.take_along_axis(np.asarray(selection.mask_BT), np.asarray(selection.index_BC[:, 21:]), axis=1).any()

"""Selecting rows and putting them back, against literal tables, and gradients against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model.routing.select import (
    gather_rows,
    merge_rows,
    scatter_rows,
    select_mask,
    select_top,
    take_rows,
    top_mask,
)


def _bits(*rows: str) -> np.ndarray:
    """bool [B, T] from strings such as "x..x"."""
    return np.array([[mark == "x" for mark in row] for row in rows])


@pytest.mark.parametrize(
    ("scores", "count", "mask", "index"),
    [
        ([0.1, 0.9, 0.5, 0.7], 2, ".x.x", [1, 3]),
        ([0.5, 0.5, 0.5, 0.5], 3, "xxx.", [0, 1, 2]),  # ties: the earlier row
        ([0.0, -0.0, 0.0, -1.0], 2, "xx..", [0, 1]),  # both zeros tie
        ([-0.0, 0.0, -1.0, 0.0], 2, "xx..", [0, 1]),
        ([-3.0, -1.0, -2.0, -1.0], 1, ".x..", [1]),
        ([3e38, -3e38, 0.0, 1.0], 4, "xxxx", [0, 1, 2, 3]),
    ],
)
def test_top_scores_are_chosen_in_order_of_position(scores, count, mask, index):
    scores_BT = jnp.array([scores, scores[::-1]], jnp.float32)
    selection = select_top(scores_BT, count)
    np.testing.assert_array_equal(selection.index_BC[0], index)
    np.testing.assert_array_equal(selection.mask_BT[:1], _bits(mask))
    np.testing.assert_array_equal(top_mask(scores_BT, jnp.asarray(count)), selection.mask_BT)


def test_slots_say_where_a_selected_row_went():
    selection = select_top(jnp.array([[0.1, 0.9, 0.5, 0.7]]), 3)
    np.testing.assert_array_equal(selection.index_BC, [[1, 2, 3]])
    assert [int(selection.slot_BT[0, row]) for row in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("asked", "capacity", "kept", "index"),
    [
        (".x.xx.", 3, ".x.xx.", [1, 3, 4]),
        (".x.xxx", 2, ".x.x..", [1, 3]),  # overflow: the earliest keep their seats
        ("...x..", 2, "...x..", [3, 0]),  # an empty seat holds a row that is not selected
        ("......", 2, "......", [0, 1]),
    ],
)
def test_seats_go_to_the_earliest(asked, capacity, kept, index):
    selection = select_mask(jnp.asarray(_bits(asked)), capacity)
    np.testing.assert_array_equal(selection.mask_BT, _bits(kept))
    np.testing.assert_array_equal(selection.index_BC[0], index)


def test_gather_scatter_and_merge_move_whole_rows():
    x_BTD = jnp.array([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]])
    selection = select_mask(jnp.asarray(_bits("x.x.")), 2)
    taken_BCD = gather_rows(x_BTD, selection)
    np.testing.assert_array_equal(taken_BCD, [[[1, 10], [3, 30]]])
    np.testing.assert_array_equal(scatter_rows(taken_BCD, selection), [[[1, 10], [0, 0], [3, 30], [0, 0]]])
    np.testing.assert_array_equal(merge_rows(-taken_BCD, x_BTD, selection), [[[-1, -10], [2, 20], [-3, -30], [4, 40]]])
    np.testing.assert_array_equal(take_rows(jnp.array([[7, 8, 9, 6]]), selection.index_BC), [[7, 9]])


@pytest.mark.parametrize("mask", [(".xx.x.", "x...xx"), ("....x.", "xxx.x.")], ids=["full", "empty seats"])
def test_gradients_equal_those_of_plain_indexing(mask):
    """What a selected row sends forward comes back to it, through both directions; empty seats send nothing."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, other_BTD = jax.random.normal(keys[0], (2, 6, 3)), jax.random.normal(keys[1], (2, 6, 3))
    weight_BCD = jax.random.normal(keys[2], (2, 3, 3))
    mask_BT = _bits(*mask)
    selection = select_mask(jnp.asarray(mask_BT), 3)

    def by_rows(x_BTD):
        used_BC = jnp.arange(3)[None, :] < selection.mask_BT.sum(axis=1, keepdims=True)
        y_BCD = jnp.where(used_BC[:, :, None], jnp.tanh(gather_rows(x_BTD, selection) * weight_BCD), 0.0)
        return jnp.sum(merge_rows(y_BCD, x_BTD, selection) * other_BTD)

    def by_indexing(x_BTD):
        for b in range(2):
            rows = [t for t in range(6) if mask_BT[b, t]][:3]
            for slot, row in enumerate(rows):
                x_BTD = x_BTD.at[b, row].set(jnp.tanh(x_BTD[b, row] * weight_BCD[b, slot]))
        return jnp.sum(x_BTD * other_BTD)

    for ours, plain in zip(jax.value_and_grad(by_rows)(x_BTD), jax.value_and_grad(by_indexing)(x_BTD), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)

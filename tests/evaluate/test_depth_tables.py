"""Depth tables against literal values."""

from types import SimpleNamespace

import numpy as np

from mor_jax.evaluate.routing import (
    RoutedRow,
    deepest_and_shallowest,
    depth_by_position,
    depth_by_token,
    routed_rows,
    tokens_per_depth,
)


def _row(tokens, depths):
    depth_T = np.array(depths)
    selected_RT = np.arange(2)[:, None] < depth_T
    zeros_RT = np.zeros((2, len(depths)), np.float32)
    return RoutedRow(np.array(tokens), depth_T, zeros_RT, zeros_RT, selected_RT, selected_RT)


ROWS = [_row([7, 8, 7, 9], [2, 1, 1, 2]), _row([7, 9], [0, 2])]


def test_routed_rows_cut_the_padding_off():
    depth_BT = np.array([[2, 1, 0], [1, 2, 2], [0, 0, 0]])
    mask_RBT = np.arange(2)[:, None, None] < depth_BT
    scores_RBT = np.arange(18.0).reshape(2, 3, 3)
    trace = SimpleNamespace(
        depth_BT=depth_BT, scores_RBT=scores_RBT, gates_RBT=-scores_RBT, active_RBT=mask_RBT, selected_RBT=mask_RBT
    )
    tokens_BT = np.arange(9).reshape(3, 3)
    first, second = routed_rows(tokens_BT, np.array([[1, 1, 0], [1, 2, 2], [0, 0, 0]]), trace)
    assert first.tokens_T.tolist() == [0, 1] and second.tokens_T.tolist() == [3, 4, 5]
    assert first.depth_T.tolist() == [2, 1]
    assert first.scores_RT.tolist() == [[0, 1], [9, 10]]
    assert second.gates_RT.tolist() == [[-3, -4, -5], [-12, -13, -14]]
    assert second.selected_RT.tolist() == [[True, True, True], [False, True, True]]
    assert second.recursions == 2


def test_tokens_per_depth():
    np.testing.assert_allclose(tokens_per_depth(ROWS), [1 / 6, 2 / 6, 3 / 6])


def test_depth_by_position_bins_rows_of_unequal_length():
    starts, shares = depth_by_position(ROWS, bins=2)
    assert starts.tolist() == [0, 2]
    np.testing.assert_allclose(shares, [[1 / 4, 1 / 4, 2 / 4], [0, 1 / 2, 1 / 2]])
    starts, shares = depth_by_position(ROWS, bins=99)
    assert starts.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(shares[1], [0, 1 / 2, 1 / 2])
    starts, _ = depth_by_position([_row(range(10), [1] * 10)], bins=4)
    assert starts.tolist() == [0, 3, 5, 8]


def test_depth_by_token_is_sorted_and_filtered():
    table = [(entry.token, entry.count, entry.mean_depth) for entry in depth_by_token(ROWS)]
    assert table == [(9, 2, 2.0), (7, 3, 1.0), (8, 1, 1.0)]
    assert [entry.token for entry in depth_by_token(ROWS, at_least=2)] == [9, 7]


def test_deepest_and_shallowest_do_not_overlap():
    entries = depth_by_token(ROWS)
    deepest, shallowest = deepest_and_shallowest(entries, 12)
    assert [entry.token for entry in deepest] == [9] and [entry.token for entry in shallowest] == [8]
    assert deepest_and_shallowest(entries[:1], 12) == ([], [])

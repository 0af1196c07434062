"""Which keys a query sees, against literal tables: as a dense mask, as runs of keys, as their bounds."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.kernels.attention.mask import Mask, TokenView

ROWS, SEGMENTS = [0, 1, 2, 3, 4, 5], [1, 1, 1, 2, 2, 0]


def _view(rows, positions=None, segments=None, valid=None) -> TokenView:
    def array(values):
        return None if values is None else jnp.array([values])

    return TokenView(jnp.array([rows]), jnp.array([positions or rows]), array(segments), array(valid))


# name: (mask, what each query sees; its kind; whether each sees one run)
CASES = {
    "causal": (Mask(_view([0, 1, 2])), ["x..", "xx.", "xxx"], "causal", True),
    "documents": (
        Mask(_view(ROWS, segments=SEGMENTS)),
        ["x.....", "xx....", "xxx...", "...x..", "...xx.", ".....x"],
        "causal within documents",
        True,
    ),
    # three tokens in four seats: the fourth holds row 0 again, whose slot comes after every token's
    "empty seats": (
        Mask(_view([2, 5, 7, 0], segments=[1, 1, 1, 1])),
        ["x...", "xx..", "xxx.", "xxxx"],
        "causal within documents",
        True,
    ),
    # rows count, not positions
    "shared": (
        Mask(_view([1, 3, 5], [1, 0, 2]), _view(ROWS, [0, 1, 2, 0, 1, 2])),
        ["xx....", "xxxx..", "xxxxxx"],
        "queries over shared keys",
        True,
    ),
    "shared documents": (
        Mask(_view([1, 3, 4], segments=[1, 2, 2]), _view(ROWS, segments=SEGMENTS)),
        ["xx....", "...x..", "...xx."],
        "queries over shared keys",
        True,
    ),
    "not valid": (
        Mask(_view([0, 1, 2, 3], valid=[True, False, True, True])),
        ["x...", "x...", "x.x.", "x.xx"],
        "with an attention mask",
        False,
    ),
    "shared, not valid": (
        Mask(
            _view([1, 3, 5], segments=[1, 2, 2]),
            _view(ROWS, segments=[1, 1, 1, 2, 2, 2], valid=[True, True, True, True, False, True]),
        ),
        ["xx....", "...x..", "...x.x"],
        "with an attention mask",
        False,
    ),
}


def _table(mask_TS) -> list[str]:
    return ["".join("x" if visible else "." for visible in row) for row in np.asarray(mask_TS)]


@pytest.mark.parametrize("name", CASES)
def test_dense_masks(name):
    mask, table, kind, is_runs = CASES[name]
    dense_B1TS = mask.dense()
    assert dense_B1TS.shape[:2] == (1, 1) and _table(dense_B1TS[0, 0]) == table
    assert (mask.kind, mask.is_runs, mask.is_causal) == (kind, is_runs, name == "causal")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_runs_are_the_same_keys(name):
    mask, table, *_ = CASES[name]
    start_BT, end_BT = mask.runs()
    if name == "causal":
        assert start_BT is None and end_BT is None
        return
    keys = np.arange(len(table[0]))
    start_T1 = 0 if start_BT is None else np.asarray(start_BT)[0, :, None]
    assert _table((keys >= start_T1) & (keys < np.asarray(end_BT)[0, :, None])) == table


def _lists(arrays: Any) -> list[Any]:
    return [array.tolist() for array in arrays]


def test_runs_by_hand():
    assert _lists(CASES["documents"][0].runs()) == [[[0, 0, 0, 3, 3, 5]], [[1, 2, 3, 4, 5, 6]]]
    assert _lists(CASES["shared documents"][0].runs()) == [[[0, 3, 3]], [[2, 4, 5]]]
    start_BT, end_BT = CASES["shared"][0].runs()
    assert start_BT is None and end_BT is not None and end_BT.tolist() == [[2, 4, 6]]


def test_bounds_by_hand():
    """Runs with nothing left open; tokens that are not valid stay in them."""
    assert _lists(CASES["causal"][0].bounds()) == [[[0, 0, 0], [1, 2, 3]]]
    assert _lists(CASES["shared"][0].bounds()) == [[[0, 0, 0], [2, 4, 6]]]
    assert _lists(CASES["shared documents"][0].bounds()) == [[[0, 3, 3], [2, 4, 5]]]
    assert _lists(CASES["not valid"][0].bounds()) == [[[0, 0, 0, 0], [1, 2, 3, 4]]]

"""Packing against literal tables."""

import numpy as np
import pytest

from mor_jax.data.packing import Row, concat_rows, cut_row, decode_row, encode_row, expand_row, pack

DOCUMENTS = [np.array(d, np.int32) for d in ([11, 12, 0], [21, 0], [31, 32, 33, 34, 35, 0], [0])]


def _table(rows, length):
    return [{name: values.tolist() for name, values in expand_row(row, length).items()} for row in rows]


def test_concat_joins_and_cuts():
    assert _table(concat_rows(DOCUMENTS, 5), 5) == [
        {"tokens": [11, 12, 0, 21, 0], "segment_ids": [1, 1, 1, 2, 2], "positions": [0, 1, 2, 0, 1]},
        {"tokens": [31, 32, 33, 34, 35], "segment_ids": [1, 1, 1, 1, 1], "positions": [0, 1, 2, 3, 4]},
        {"tokens": [0, 0, 0, 0, 0], "segment_ids": [1, 2, 0, 0, 0], "positions": [0, 0, 0, 0, 0]},
    ]


def test_concat_goes_on_in_the_next_row():
    assert _table(concat_rows(DOCUMENTS, 4), 4) == [
        {"tokens": [11, 12, 0, 21], "segment_ids": [1, 1, 1, 2], "positions": [0, 1, 2, 0]},
        {"tokens": [0, 31, 32, 33], "segment_ids": [1, 2, 2, 2], "positions": [0, 0, 1, 2]},
        {"tokens": [34, 35, 0, 0], "segment_ids": [1, 1, 1, 2], "positions": [0, 1, 2, 0]},
    ]


def test_concat_of_nothing_is_nothing():
    assert list(concat_rows([], 4)) == []


def test_best_fit_keeps_documents_whole_and_cuts_long_ones():
    rows = _table(pack(DOCUMENTS, 5, "best_fit"), 5)
    assert sorted(rows, key=lambda row: row["tokens"]) == [
        {"tokens": [0, 0, 0, 0, 0], "segment_ids": [1, 2, 0, 0, 0], "positions": [0, 0, 0, 0, 0]},
        {"tokens": [11, 12, 0, 21, 0], "segment_ids": [1, 1, 1, 2, 2], "positions": [0, 1, 2, 0, 1]},
        {"tokens": [31, 32, 33, 34, 35], "segment_ids": [1, 1, 1, 1, 1], "positions": [0, 1, 2, 3, 4]},
    ]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_token_is_lost(packing):
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 1000, size=n).astype(np.int32) for n in generator.integers(1, 40, size=50)]
    rows = list(pack(documents, 16, packing))
    assert sorted(np.concatenate([row.tokens for row in rows])) == sorted(np.concatenate(documents))
    assert all(len(row.tokens) <= 16 and row.starts[0] == 0 for row in rows)


def test_record_round_trip():
    row = Row(np.array([5, 70000, 0]), np.array([0, 2]))
    record = encode_row(row)
    assert np.frombuffer(record, "<i4").tolist() == [2, 0, 2, 5, 70000, 0]
    decoded = decode_row(record)
    assert decoded.tokens.tolist() == [5, 70000, 0] and decoded.starts.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("offset", "tokens", "starts"),
    [(0, [10, 11, 12], [0, 2]), (2, [12, 13, 14], [0, 2]), (3, [13, 14, 15], [0, 1]), (5, [15], [0]), (6, [], [])],
)
def test_cut_row(offset, tokens, starts):
    piece = cut_row(Row(np.arange(10, 16), np.array([0, 2, 4])), offset, 3)
    assert piece.tokens.tolist() == tokens and piece.starts.tolist() == starts


def test_expand_an_empty_row():
    assert _table([Row(np.array([], np.int32), np.array([], np.int32))], 2) == [
        {"tokens": [0, 0], "segment_ids": [0, 0], "positions": [0, 0]}
    ]

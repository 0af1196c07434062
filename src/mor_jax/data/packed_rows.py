"""Rows of prepared shards by index: the random-access sources that Grain reads."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from mor_jax.data.packing import cut_row, decode_row, expand_row


class RowSource:
    """Rows of one split as ``expand_row`` gives them, by index (a Grain ``RandomAccessDataSource``).

    A stored row whose context is n times the wanted one is read as n pieces that overlap by one token, so that every
    token is still a target as often as before.

    Args:
        paths: ArrayRecord files.
        stored_context: context length of the stored rows.
        context_length: the wanted one; divides ``stored_context``.
    """

    def __init__(self, paths: Sequence[str], stored_context: int, context_length: int) -> None:
        self._records: Any = grain.sources.ArrayRecordDataSource(list(paths))
        self._pieces = stored_context // context_length
        self._context_length = context_length

    def __len__(self) -> int:
        return len(self._records) * self._pieces

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record, piece = divmod(index, self._pieces)
        row = decode_row(self._records[record])
        if self._pieces > 1:
            row = cut_row(row, piece * self._context_length, self._context_length + 1)
        return expand_row(row, self._context_length + 1)


class PaddedSource:
    """Sources one after the other, then empty rows (all padding) up to ``length``: a finite pass of full batches."""

    def __init__(self, rows: Sequence[RowSource], length: int, row_length: int) -> None:
        self._rows = list(rows)
        self._ends = np.cumsum([len(source) for source in rows])
        self._length = length
        self._row_length = row_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        if which == len(self._rows):
            return {name: np.zeros(self._row_length, np.int32) for name in ("tokens", "segment_ids", "positions")}
        return self._rows[which][index - (int(self._ends[which - 1]) if which else 0)]


class RowsOfBatches:
    """Some rows of every batch, one batch after the other: what one host reads of the global batches.

    Args:
        dataset: all rows, by index.
        batch_size: rows of a batch; divides the length.
        rows: positions in the batch, in the order in which they are wanted.
    """

    def __init__(self, dataset: Any, batch_size: int, rows: Sequence[int]) -> None:
        self._dataset, self._batch_size, self._rows = dataset, batch_size, list(rows)

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, position = divmod(index, len(self._rows))
        return self._dataset[batch * self._batch_size + self._rows[position]]

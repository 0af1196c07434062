"""Documents to fixed rows and back: packing, the row record, segment ids and restarting positions.

A row has up to ``row_length`` = context length + 1 tokens and the offsets at which its documents start. On disk it is
one little-endian int32 array ``[number of starts, starts..., tokens...]``; padding is not stored.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mor_jax.config import Packing

RECORD_FORMAT = "int32 little-endian: number of document starts, the starts, the tokens (fewer than a row: padding)"
_BEST_FIT_BINS = 64


class Row(NamedTuple):
    """Tokens of one row and the ascending offsets at which its documents start (the first is 0)."""

    tokens: np.ndarray
    starts: np.ndarray


def encode_row(row: Row) -> bytes:
    """Return the record of a row."""
    return np.concatenate([[len(row.starts)], row.starts, row.tokens]).astype("<i4").tobytes()


def decode_row(record: bytes) -> Row:
    """Return the row of a record."""
    values = np.frombuffer(record, dtype="<i4")
    count = int(values[0])
    return Row(tokens=values[1 + count :], starts=values[1 : 1 + count])


def cut_row(row: Row, offset: int, length: int) -> Row:
    """Return tokens ``offset .. offset + length`` of a row as a row of their own."""
    inside = row.starts[(row.starts > offset) & (row.starts < offset + length)] - offset
    tokens = row.tokens[offset : offset + length]
    return Row(tokens, np.concatenate([[0], inside]) if len(tokens) else inside)


def expand_row(row: Row, row_length: int) -> dict[str, np.ndarray]:
    """Derive what the model reads from a row.

    Args:
        row: at most ``row_length`` tokens.
        row_length: context length + 1.

    Returns:
        ``tokens``, ``segment_ids`` (1-based, 0 = padding) and ``positions`` (restarting with every document), each
        int32 ``[row_length]``; padding is 0 in all three.
    """
    used = len(row.tokens)
    lengths = np.diff(row.starts, append=used)
    expanded = {name: np.zeros(row_length, dtype=np.int32) for name in ("tokens", "segment_ids", "positions")}
    expanded["tokens"][:used] = row.tokens
    expanded["segment_ids"][:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    expanded["positions"][:used] = np.arange(used) - np.repeat(row.starts, lengths)
    return expanded


def concat_rows(documents: Sequence[np.ndarray], row_length: int) -> Iterator[Row]:
    """Join the documents and cut the stream into rows, as the release does; the last row may be shorter.

    Args:
        documents: token ids per document, the end-of-text token included.
        row_length: tokens of a row.

    Yields:
        Rows; a document that goes on from the row before counts as a start at offset 0.
    """
    lengths = [len(document) for document in documents]
    if not sum(lengths):
        return
    stream = np.concatenate(documents)
    starts = np.cumsum([0, *lengths])[:-1]
    for offset in range(0, len(stream), row_length):
        first, last = np.searchsorted(starts, [offset + 1, offset + row_length])
        inside = starts[first:last] - offset
        yield Row(stream[offset : offset + row_length], np.concatenate([[0], inside]))


def best_fit_rows(documents: Iterable[np.ndarray], row_length: int) -> Iterator[Row]:
    """Put whole documents into the row they fill best (grain's best-fit packer); longer ones are cut into rows first.

    Args:
        documents: token ids per document, the end-of-text token included.
        row_length: tokens of a row.

    Yields:
        Rows, padded at the end where nothing fits.
    """
    import grain
    from grain.experimental import BestFitPackIterDataset

    pieces = [
        {"tokens": document[offset : offset + row_length].astype(np.int32)}
        for document in documents
        for offset in range(0, len(document), row_length)
    ]
    if not pieces:
        return
    packed = BestFitPackIterDataset(
        grain.MapDataset.source(pieces).to_iter_dataset(),
        length_struct={"tokens": row_length},
        num_packing_bins=_BEST_FIT_BINS,
        shuffle_bins=False,
    )
    for row in packed:
        segment_ids = row["tokens_segment_ids"]
        used = int(np.count_nonzero(segment_ids))
        starts = np.flatnonzero(np.diff(segment_ids[:used], prepend=0))
        yield Row(row["tokens"][:used], starts)


def pack(documents: Sequence[np.ndarray], row_length: int, packing: Packing) -> Iterator[Row]:
    """Pack documents into rows by ``packing``."""
    return concat_rows(documents, row_length) if packing == "concat" else best_fit_rows(documents, row_length)

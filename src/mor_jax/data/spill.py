"""First pass of ``prepare``: deal the documents to buckets by hash, so that each can be shuffled and packed on its own.

A document's digest (of its text and the seed) gives its bucket and its place in it; the digest of its group, or else
of its text, gives its split, unless the held-out documents are given. So the result depends neither on the order of
the inputs nor on the number of workers, and exact copies of a text are never on both sides of the split.
"""

import logging
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from mor_jax.data.readers import Document
from mor_jax.errors import require

_log = logging.getLogger(__name__)
_HEADER = struct.Struct("<16sI")
_BUFFER = 1 << 18
_RANGE = 1 << 64


def digest(text: str, seed: int) -> bytes:
    """Return the 16-byte digest of a text under a seed."""
    return blake2b(text.encode("utf-8"), digest_size=16, key=str(seed).encode()).digest()


def deal(
    documents: Callable[[], Iterable[Document]],
    held_out: Iterable[Document] | None,
    folder: Path,
    *,
    seed: int,
    validation_share: float,
    train_buckets: int,
    validation_buckets: int,
) -> None:
    """Write every document to ``folder/{train|validation}-<bucket>``; the folder appears only when all are written.

    Args:
        documents: gives the documents anew at every call.
        held_out: the validation split, whose texts are left out of the others; None takes a share of ``documents``.
        folder: must not exist.
        seed: of shuffle and split.
        validation_share: share of the documents that is held out; where chance would hold out none, the document (or
            group) with the smallest digest is.
        train_buckets: buckets of the train split.
        validation_buckets: buckets of the validation split.

    Raises:
        UserError: the train split would be empty.
    """
    buckets = {False: ("train", train_buckets), True: ("validation", validation_buckets)}

    def write(threshold: int) -> tuple[dict[bool, int], int]:
        target = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        counts, smallest = {False: 0, True: 0}, _RANGE
        given: set[bytes] = set()
        with _Appender(target) as appender:

            def add(document: Document, key: bytes, is_held_out: bool) -> None:
                counts[is_held_out] += 1
                name, number = buckets[is_held_out]
                data = document.text.encode("utf-8")
                appender.add(f"{name}-{int.from_bytes(key[8:]) % number:05d}", _HEADER.pack(key, len(data)) + data)

            for document in held_out or ():
                key = digest(document.text, seed)
                given.add(key)
                add(document, key, True)
            copies = 0
            for document in documents():
                key = digest(document.text, seed)
                if key in given:
                    copies += 1
                    continue
                place = _place(key if document.group is None else digest(document.group, seed))
                smallest = min(smallest, place)
                add(document, key, place < threshold)
        if copies:
            _log.info("%d documents are left out of the train split: their text is held out", copies)
        return counts, smallest

    counts, smallest = write(int(validation_share * _RANGE))
    if validation_share > 0 and counts[True] == 0:
        counts, _ = write(smallest + 1)
    if held_out is not None:
        require(counts[False] > 0, "validation has every document of the inputs: nothing is left to train on")
    rule = "a single document cannot be split, however often it comes; add documents or set validation_share=0"
    require(counts[False] > 0, f"validation_share={validation_share} of {sum(counts.values())} documents: {rule}")
    folder.with_name(folder.name + ".tmp").rename(folder)


def read_bucket(path: Path) -> list[str]:
    """Return the texts of one bucket in shuffled order."""
    return [text for _, text in sorted(_records(path.read_bytes()))]


def _records(data: bytes) -> Iterator[tuple[bytes, str]]:
    offset = 0
    while offset < len(data):
        key, size = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        yield key, data[offset : offset + size].decode("utf-8")
        offset += size


def _place(key: bytes) -> int:
    return int.from_bytes(key[:8])


class _Appender:
    """Appends to many files through small buffers, holding none of them open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffers: defaultdict[str, bytearray] = defaultdict(bytearray)

    def __enter__(self) -> "_Appender":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for name in self._buffers:
                self._flush(name)

    def add(self, name: str, data: bytes) -> None:
        self._buffers[name] += data
        if len(self._buffers[name]) >= _BUFFER:
            self._flush(name)

    def _flush(self, name: str) -> None:
        with (self._folder / name).open("ab") as file:
            file.write(self._buffers[name])
        self._buffers[name].clear()

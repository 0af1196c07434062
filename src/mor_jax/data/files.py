"""Hashing files, and writing them so that a half-written one never has the final name."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 1 << 20


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; it takes the place of ``path`` when the block ends without an error."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)

"""Files opened as one stream of bytes, plain or compressed; what ends early or goes on otherwise is an error.

Python's own readers of .xz and .bz2 pass over whatever follows a whole stream that is not another one; here it is
damage, as it is in .gz.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from mor_jax.errors import UserError

_PIECE = 1 << 16
_LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`, which data sets of many GB are packed with


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("it needs the package zstandard: pip install -e '.[prepare]'") from error
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


_DECOMPRESSORS: Mapping[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16),
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
    ".bz2": bz2.BZ2Decompressor,
}
COMPRESSED_SUFFIXES = tuple(_DECOMPRESSORS)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed as its suffix says (in any case)."""
    new = _DECOMPRESSORS.get(path.suffix.lower())
    return path.open("rb") if new is None else cast(BinaryIO, io.BufferedReader(_Decompressed(path, new), _PIECE))


class _Decompressed(io.RawIOBase):
    """The content of one or more compressed streams, one after the other."""

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        self._new = new
        self._stream = new()
        self._rest = b""
        self._buffer = memoryview(b"")
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._buffer:
            piece, self._rest = self._rest or self._file.read(_PIECE), b""
            if self._stream.eof:
                if not piece:
                    return 0
                piece = piece.lstrip(b"\0")  # zeros may pad what follows a stream
                if not piece:
                    continue
                self._stream = self._new()
            elif not piece:
                raise EOFError("it ends within the compressed data")
            self._buffer = memoryview(self._stream.decompress(piece))
            if self._stream.eof:
                self._rest = self._stream.unused_data
        size = min(len(buffer), len(self._buffer))
        buffer[:size], self._buffer = self._buffer[:size], self._buffer[size:]
        return size

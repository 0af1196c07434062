"""Readers of text, jsonl and parquet files, plain or compressed; whatever cannot be read whole is a ``UserError``."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mor_jax.errors import UserError, require

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
TEXT_FIELD = "text"
SOURCE_FIELD = "source"
_PIECE = 1 << 16
_EXPANSION = {".gz": 3, ".xz": 4, ".zst": 4, PARQUET_SUFFIX: 3}


class Document(NamedTuple):
    """One text; documents of the same group stay on the same side of the train/validation split."""

    text: str
    group: str | None = None
    source: str | None = None
    """Where it comes from, as a jsonl line's string field ``source`` says; losses can be reported by it."""


def is_corpus_file(path: Path) -> bool:
    """Return whether the name is that of a file this module reads."""
    return _format_of(path) != ""


def text_size(path: Path) -> int:
    """Return an estimate of the bytes of text in a file, from its size."""
    return path.stat().st_size * _EXPANSION.get(path.suffix, 1)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file.

    A jsonl line or parquet row is one document (its string field ``text``). A text file is cut at a blank line, or
    else at a line end, into documents of about 64 KiB, so that one long file can be shuffled and split.

    Raises:
        UserError: the file is missing, empty, binary, truncated, of an unknown kind, or holds no text.
    """
    require(path.is_file(), f"input {path}: no such file")
    require(path.stat().st_size > 0, f"input {path} is empty")
    kind = _format_of(path)
    known = f"{', '.join((*TEXT_SUFFIXES, *JSONL_SUFFIXES))} (plain, .gz, .xz, .zst), {PARQUET_SUFFIX}"
    require(kind != "", f"input {path}: unknown kind of file; known are {known}")
    found = False
    try:
        for document in {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[kind](path):
            if document.text.strip():
                found = True
                yield document
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"input {path} is truncated or not {path.suffix} data ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"input {path} is not UTF-8 text (byte {error.object[error.start]:#04x}); is it binary?"
        ) from error
    require(found, f"input {path} holds no text")


def _format_of(path: Path) -> str:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] == PARQUET_SUFFIX:
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    return "text" if last in TEXT_SUFFIXES else "jsonl" if last in JSONL_SUFFIXES else ""


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # pyright: ignore[reportReturnType]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")  # pyright: ignore[reportReturnType]
    return io.BufferedReader(_ZstdFile(path)) if path.suffix == ".zst" else path.open("rb")  # pyright: ignore[reportReturnType]


class _ZstdFile(io.RawIOBase):
    """Reads a .zst file of one or more frames; unlike zstandard's own reader it notices a truncated one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"input {path} needs the package zstandard: install mor-jax[prepare]") from error
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._path = path
        self._file = path.open("rb")
        self._frame: Any = None
        self._buffer = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._buffer:
            chunk = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if not chunk:
                chunk = self._file.read(_PIECE)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._buffer = self._frame.decompress(chunk)
            except self._error as error:
                raise UserError(f"input {self._path} is truncated or not .zst data ({error})") from error
        size = min(len(buffer), len(self._buffer))
        buffer[:size], self._buffer = self._buffer[:size], self._buffer[size:]
        return size


def _read_text(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    size = 0
    with io.TextIOWrapper(_open(path), encoding="utf-8") as file:
        for line in file:
            require("\0" not in line, f"input {path} is not text: it holds NUL bytes")
            lines.append(line)
            size += len(line)
            if size >= _PIECE and (not line.strip() or size >= 2 * _PIECE):
                yield Document("".join(lines))
                lines, size = [], 0
    yield Document("".join(lines))


def _read_jsonl(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"input {path}, line {number}"
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise UserError(f"{where}: not a JSON object ({error}); is the file truncated or binary?") from error
            require(isinstance(values, dict), f"{where}: not a JSON object")
            source = values.get(SOURCE_FIELD)
            text = _checked_text(values.get(TEXT_FIELD), where)
            yield Document(text, source=source if isinstance(source, str) else None)


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"input {path} needs the package pyarrow: install mor-jax[prepare]") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require(TEXT_FIELD in names, f"input {path} has no column {TEXT_FIELD!r} (it has {', '.join(names)})")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[TEXT_FIELD]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(_checked_text(value, f"input {path}, row {number}"))
    except ArrowException as error:
        raise UserError(f"input {path} is truncated or not a parquet file ({error})") from error


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {TEXT_FIELD!r} is {value!r:.60}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field {TEXT_FIELD!r} holds a lone surrogate, which UTF-8 cannot carry"
        ) from error
    return value

"""Readers of text, JSON and parquet files, plain or compressed; whatever cannot be read whole is a ``UserError``.

Every message names the file, and the line, row or item where that is known.
"""

import codecs
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mor_jax.data.compression import COMPRESSED_SUFFIXES, open_bytes
from mor_jax.errors import UserError, reason, require, require_text, shown

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
PARQUET_SUFFIX = ".parquet"
KNOWN = (
    f"{', '.join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, JSON_SUFFIX))} (plain, {', '.join(COMPRESSED_SUFFIXES)}), "
    f"{PARQUET_SUFFIX}"
)
TEXT_FIELD = "text"
SOURCE_FIELD = "source"
_PIECE = 1 << 16
_EXPANSION = {".gz": 3, ".xz": 4, ".zst": 4, ".bz2": 4, PARQUET_SUFFIX: 3}
_LARGEST_METADATA = 1 << 20
_OTHER_UNICODE = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Document(NamedTuple):
    """One text; documents of the same group stay on the same side of the train/validation split."""

    text: str
    group: str | None = None
    source: str | None = None
    """Where it comes from, as a JSON object's string field ``source`` says; losses can be reported by it."""


def is_corpus_file(path: Path) -> bool:
    """Return whether the name is that of a file this module reads."""
    return _format_of(path) != ""


def text_size(path: Path) -> int:
    """Return an estimate of the bytes of text in a file, from its size."""
    return path.stat().st_size * _EXPANSION.get(path.suffix.lower(), 1)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file.

    A line of JSON lines, an object of a JSON array or a parquet row is one document (its string field ``text``). A
    text file is cut at a blank line, or else at a line end, into documents of about 64 KiB, so that one long file can
    be shuffled and split.

    Raises:
        UserError: the file is missing, empty, binary, truncated, damaged, of an unknown kind, or holds no text.
    """
    check_file(path)
    readers = {"text": _read_text, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    found = False
    with reading(path):
        require(path.stat().st_size > 0, f"input {path} is empty")
        for document in readers[_format_of(path)](path):
            if document.text.strip():
                found = True
                yield document
    require(found, f"input {path} holds no text")


def json_lines(path: Path, what: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON lines, plain or compressed; blank lines are passed over.

    Args:
        path: the file.
        what: names it in messages; empty is ``input PATH``.

    Raises:
        UserError: it cannot be read whole, or a line is no JSON object; with the line's number where that is known.
    """
    what = what or f"input {path}"
    with reading(path, what), _open_unicode(path, what) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_object(line, f"{what}, line {number}")


def check_file(path: Path) -> None:
    """Refuse what is no file, or none of a known kind.

    Raises:
        UserError: as said.
    """
    require(path.is_file(), f"input {path}: " + ("not a regular file" if path.exists() else "no such file"))
    require(is_corpus_file(path), f"input {path}: unknown kind of file; known are {KNOWN}")


def is_metadata(path: Path) -> bool:
    """Return whether a ``.json`` file is one object without a text, as lies beside many data sets, and no documents."""
    if _format_of(path) != "json":
        return False
    try:
        with open_bytes(path) as file:
            data = file.read(_LARGEST_METADATA + 1)
        values = json.loads(data.decode("utf-8-sig")) if len(data) <= _LARGEST_METADATA else None
    except Exception:  # whoever reads it as documents will say what is wrong
        return False
    return isinstance(values, dict) and TEXT_FIELD not in values


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one ``UserError`` that names it.

    Args:
        path: the file.
        what: names it in messages; empty is ``input PATH``.

    Raises:
        UserError: the file cannot be read, or is damaged; other errors that name an input pass.
    """
    what = what or f"input {path}"
    kind = f"{path.suffix.lower()} data" if path.suffix else "what it should be"
    try:
        yield
    except UserError as error:
        raise error if what in str(error) else UserError(f"{what}: {error}") from error.__cause__
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{_line_of(path, error)} {_not_unicode(error)}") from error
    except OSError as error:
        if error.errno is None:  # of a library: a full disk or a missing file has a number
            raise UserError(f"{what} is truncated, damaged or not {kind} ({reason(error)})") from error
        raise UserError(f"{what} cannot be read: {reason(error)}") from error
    except MemoryError as error:
        raise UserError(f"{what} needs more memory than there is ({reason(error)})") from error
    except Exception as error:  # the libraries raise kinds of every family for damaged data
        raise UserError(f"{what} is truncated, damaged or not {kind} ({reason(error)})") from error


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == PARQUET_SUFFIX:
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    kinds = {JSON_SUFFIX: "json", **dict.fromkeys(TEXT_SUFFIXES, "text"), **dict.fromkeys(JSONL_SUFFIXES, "jsonl")}
    return kinds.get(last, "")


def _open_unicode(path: Path, what: str) -> BinaryIO:
    """Open UTF-8 text behind its byte-order mark, if it has one; another one is refused by its name."""
    file = open_bytes(path)
    start = cast(Any, file).peek(4)[:4]
    for mark, name in _OTHER_UNICODE.items():
        if start.startswith(mark):
            file.close()
            raise UserError(f"{what} is {name} text: convert it to UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _read_text(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    size = 0
    with io.TextIOWrapper(_open_unicode(path, f"input {path}"), encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            require("\0" not in line, f"input {path}, line {number} is not text: it holds NUL bytes")
            lines.append(line)
            size += len(line)
            if size >= _PIECE and (not line.strip() or size >= 2 * _PIECE):
                yield Document("".join(lines))
                lines, size = [], 0
    yield Document("".join(lines))


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, values in json_lines(path):
        yield _document(values, f"input {path}, line {number}")


def _read_json(path: Path) -> Iterator[Document]:
    """Yield the documents of JSON lines, as most data sets mean ``.json``, or of one array, which is held in memory."""
    with _open_unicode(path, f"input {path}") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        is_lines = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _read_jsonl(path)
        return
    with _open_unicode(path, f"input {path}") as file:
        text = file.read().decode("utf-8")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        rule = "neither JSON lines nor one array of objects"
        raise UserError(f"input {path} is {rule} ({reason(error)}); is it truncated?") from error
    for number, item in enumerate(values if isinstance(values, list) else [values], start=1):
        where = f"input {path}, item {number}"
        require(isinstance(item, dict), f"{where}: not a JSON object")
        yield _document(item, where)


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))  # files with marks may be joined
    except UnicodeDecodeError as error:
        raise UserError(f"{where} {_not_unicode(error)}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not a JSON object that can be read (nested too deeply)") from error
    except ValueError as error:
        hint = "it holds NUL bytes" if b"\0" in line else "is the file truncated or binary?"
        raise UserError(f"{where}: not a JSON object ({reason(error)}); {hint}") from error
    require(isinstance(values, dict), f"{where}: not a JSON object")
    return values


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"input {path} needs the package pyarrow: pip install -e '.[prepare]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            found = f"it has {shown(', '.join(names))}"
            require(TEXT_FIELD in names, f"input {path} has no column {TEXT_FIELD!r} ({found})")
            for batch in file.iter_batches(batch_size=256, columns=[TEXT_FIELD]):
                for value in batch.column(0):
                    text = value.as_py()
                    number += 1
                    yield Document(_checked_text(text, f"input {path}, row {number}"))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}, row {number + 1} {_not_unicode(error)}") from error
    except Exception as error:  # pyarrow raises OSError for damaged pages, and many other kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = f", after row {number}," if number else ""
        rule = "is truncated, damaged or not a parquet file"
        raise UserError(f"input {path}{where} {rule} ({reason(error)})") from error


def _document(values: dict[str, Any], where: str) -> Document:
    source = values.get(SOURCE_FIELD)
    text = _checked_text(values.get(TEXT_FIELD), where)
    source = require_text(source, f"{where}: the field {SOURCE_FIELD!r}") if isinstance(source, str) else None
    return Document(text, source=source)


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {TEXT_FIELD!r} is {shown(value)}, not a string")
    return require_text(value, f"{where}: the field {TEXT_FIELD!r}")


def _not_unicode(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte {error.object[error.start]:#04x}); is it binary?"


def _line_of(path: Path, error: UnicodeDecodeError) -> str:
    """Find the line that cannot be decoded; the error knows its place in a piece only."""
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode(error.encoding)
                except UnicodeDecodeError:
                    return f", line {number},"
    except (OSError, EOFError):
        pass
    return ""

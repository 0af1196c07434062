"""Every kind of file, whole and broken."""

import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from mor_jax.data.inputs import open_sources
from mor_jax.data.readers import read_documents
from mor_jax.errors import UserError

TEXTS = ["first text", "zweiter Text, größer", "third " * 2000]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(suffix, tmp_path):
    assert _texts(_write(tmp_path / f"a.b.jsonl{suffix}", COMPRESS[suffix](LINES))) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text(suffix, tmp_path):
    assert _texts(_write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix]("naïve\n\ntext\n".encode()))) == [
        "naïve\n\ntext\n"
    ]


def test_two_zst_frames(tmp_path):
    data = zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])
    assert _texts(_write(tmp_path / "a.jsonl.zst", data)) == TEXTS


def test_parquet(tmp_path):
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == TEXTS


def test_long_text_is_cut_at_blank_lines(tmp_path):
    text = ("a line of prose\n" * 99 + "\n") * 200
    documents = _texts(_write(tmp_path / "long.txt", text.encode()))
    assert len(documents) > 3 and "".join(documents) == text and all(d.endswith("\n\n") for d in documents)


def test_blank_documents_are_left_out(tmp_path):
    assert _texts(_write(tmp_path / "a.jsonl", b'{"text": " \\n"}\n\n{"text": "x"}\n')) == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n \n", "holds no text"),
        ("a.txt", b"text\0text", "NUL bytes"),
        ("a.txt", b"\x89PNG\xff\xfe", "not UTF-8"),
        ("a.pdf", b"text", "unknown kind of file"),
        ("a", b"text", "unknown kind of file"),
        ("a.jsonl", LINES[:-8], "line 3: not a JSON object .*truncated"),
        ("a.jsonl", b"\x89PNG\xff\xfe\n", "not UTF-8|not a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1: the field 'text' is None"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' is 3"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "truncated"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-12], "truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-12], "truncated"),
        ("a.jsonl.gz", LINES, "truncated or not .gz data"),
        ("a.jsonl.xz", LINES, "truncated or not .xz data"),
        ("a.jsonl.zst", LINES, "truncated or not .zst data"),
        ("a.parquet", b"PAR1 no", "truncated or not a parquet file"),
    ],
)
def test_bad_files(name, data, message, tmp_path):
    path = _write(tmp_path / name, data)
    with pytest.raises(UserError, match=message) as raised:
        _texts(path)
    assert str(path) in str(raised.value)


def test_parquet_without_text(tmp_path):
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'"):
        _texts(tmp_path / "a.parquet")


def test_missing_inputs(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'x.txt'}: no such file")):
        open_sources([str(tmp_path / "x.txt")])
    with pytest.raises(UserError, match="a folder without"):
        open_sources([str(tmp_path)])
    with pytest.raises(UserError, match="no input given"):
        open_sources([])


def test_a_folder_gives_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "deep/a.jsonl", "notes.pdf"):
        _write(tmp_path / name, LINES)
    assert [source.name for source in open_sources([str(tmp_path)])] == ["b.txt", "a.jsonl"]

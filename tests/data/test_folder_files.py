"""What of a folder is read: everything that can be, once; the rest is said."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from mor_jax.data.folder_files import folder_files
from mor_jax.data.inputs import open_sources
from mor_jax.data.manifest import read_manifest
from mor_jax.data.prepare import prepare
from mor_jax.errors import UserError

LINE = b'{"text": "one"}\n'


def _make(folder: Path, *names: str, data: bytes = LINE) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder_files(folder)]


@pytest.fixture
def said(caplog):
    """The lines that were logged."""
    caplog.set_level(logging.INFO, logger="mor_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def test_every_known_kind_in_sorted_order(tmp_path, said):
    known = ["B.JSONL", "a.jsonl", "b/c.json", "b/d.txt.bz2", "c.json.gz", "d.Parquet", "e.ndjson.zst", "f.md", "z.rst"]
    _make(tmp_path, *known)
    assert _names(tmp_path) == known == sorted(known)
    assert said() == []


def test_what_is_left_out_is_said_once(tmp_path, said):
    _make(tmp_path, "a.jsonl", "x/a.csv", "b.bin", "c.log", "d", ".hidden.jsonl", ".ipynb_checkpoints/a.jsonl")
    _make(tmp_path, "info.json", data=json.dumps({"features": {}}, indent=1).encode())
    assert _names(tmp_path) == ["a.jsonl"]
    [line] = said()
    assert line.startswith(f"input {tmp_path}: left out: ")
    assert "4 of unknown kind (b.bin, c.log, d, ...)" in line
    assert "2 hidden (.hidden.jsonl, .ipynb_checkpoints)" in line
    assert "1 .json without a text (info.json)" in line


def test_a_folder_of_nothing_that_is_known(tmp_path):
    _make(tmp_path, "a.csv")
    with pytest.raises(UserError, match=r"folder without data .*\.bz2.*left out: 1 of unknown kind \(a\.csv\)"):
        folder_files(tmp_path)


def test_links(tmp_path, said):
    data, other = tmp_path / "data", tmp_path / "other"
    _make(data, "a.jsonl", "deep/b.jsonl")
    _make(other, "c.jsonl", "blob")
    (data / "linked").symlink_to(other)
    (data / "again").symlink_to(data / "deep")
    (data / "circle").symlink_to(data)
    (data / "deep" / "up").symlink_to("..")
    (data / "0.jsonl").symlink_to(data / "a.jsonl")
    (data / "named.jsonl").symlink_to(other / "blob")
    (data / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    (data / "self.jsonl").symlink_to("self.jsonl")
    os.mkfifo(data / "pipe.jsonl")
    assert _names(data) == ["a.jsonl", "deep/b.jsonl", "linked/c.jsonl", "named.jsonl"]
    [line] = said()
    assert "4 reached twice through links (0.jsonl, again, circle, ...)" in line
    assert "2 broken links (lost.jsonl, self.jsonl)" in line
    assert "1 neither files nor folders (pipe.jsonl)" in line
    assert "unknown" not in line  # the blob is read by its link's name


def test_a_folder_named_by_a_link(tmp_path):
    _make(tmp_path / "data", "a.jsonl")
    (tmp_path / "link").symlink_to("data")
    assert _names(tmp_path / "link") == ["a.jsonl"]


def test_copies_that_are_no_links_count_each(tmp_path):
    _make(tmp_path, "a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert _names(tmp_path) == ["a.jsonl", "b.jsonl"]


def test_damaged_json_is_no_metadata(tmp_path):
    _make(tmp_path, "a.jsonl")
    _make(tmp_path, "b.json.gz", data=gzip.compress(LINE)[:-9])
    with pytest.raises(UserError, match=r"b\.json\.gz is truncated"):
        [list(source.documents()) for source in open_sources([str(tmp_path)])]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    _make(tmp_path, "a.jsonl")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        folder_files(tmp_path)


def test_a_folder_gives_the_corpus_of_its_files(tmp_path, write_jsonl):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    files = [write_jsonl(tmp_path / "data" / name, word=name[0]) for name in ("b.jsonl", "sub/a.jsonl")]
    settings = {"tokenizer": "bytes", "context_length": 32}
    one = prepare([str(tmp_path / "data")], tmp_path / "one", **settings)
    two = prepare([str(file) for file in files], tmp_path / "two", **settings)
    assert read_manifest(one) == read_manifest(two)
    # as before links and other suffixes were read: a corpus that was begun then goes on
    assert read_manifest(one).settings.source_hash == "e805f703e5a6b0477e0d1c7c3ae4629ce66f320fae4e0760053fe7b26de64a48"
    assert [source.name for source in open_sources([str(tmp_path / "data")])] == ["b.jsonl", "a.jsonl"]

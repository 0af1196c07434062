"""What ``prepare`` writes, what it refuses, and what survives a kill."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mor_jax.data import shards, spill
from mor_jax.data.corpus import open_corpus
from mor_jax.data.inputs import FileSource
from mor_jax.data.manifest import check_shards, read_manifest
from mor_jax.data.packed_rows import RowSource
from mor_jax.data.prepare import prepare
from mor_jax.data.readers import read_documents
from mor_jax.errors import UserError

CONTEXT = 32  # of the corpus fixtures
SETTINGS = {"tokenizer": "bytes", "context_length": CONTEXT, "validation_share": 0.2, "shard_bytes": 1500}


@pytest.fixture
def text(tmp_path, write_jsonl):
    return str(write_jsonl(tmp_path / "text.jsonl"))


def test_manifest_counts(corpus):
    manifest = read_manifest(corpus)
    check_shards(corpus, manifest, full=True)
    texts = [json.loads(line)["text"] for line in (corpus.parent / "text.jsonl").read_text().splitlines()]
    assert sum(t.documents for t in manifest.splits) == len(texts) == 60
    assert sum(t.text_bytes for t in manifest.splits) == sum(len(t.encode()) for t in texts)
    for totals in manifest.splits:
        assert totals.documents > 0 and totals.tokens == totals.text_bytes + totals.documents  # one end of text each
        assert totals.bytes_per_token == totals.text_bytes / totals.tokens
    assert len(manifest.of("train")) > 2
    assert not list(corpus.parent.glob("*.partial")) and not list(corpus.glob("*.tmp"))


def test_rows_hold_the_documents(corpus):
    opened = open_corpus(corpus)
    texts = []
    for split in ("train", "validation"):
        rows = RowSource(opened.paths(split), CONTEXT, CONTEXT)
        ids = [t for i in range(len(rows)) for t, s in zip(rows[i]["tokens"], rows[i]["segment_ids"], strict=True) if s]
        texts += bytes(255 if t == 256 else t for t in ids).split(b"\xff")[:-1]
    wanted = [json.loads(line)["text"].encode() for line in (corpus.parent / "text.jsonl").read_text().splitlines()]
    assert sorted(texts) == sorted(wanted) and texts != wanted


def test_neither_workers_nor_input_order_matter(corpus, tmp_path):
    lines = (corpus.parent / "text.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[40:]), ("b.jsonl", lines[:40])):
        (tmp_path / name).write_text("".join(part))
    inputs = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    made = prepare(inputs, tmp_path / "out", workers=2, **SETTINGS)
    assert read_manifest(made).settings.shards == read_manifest(corpus).settings.shards
    assert read_manifest(made).hash == read_manifest(corpus).hash


def test_again_is_free_and_other_settings_are_refused(corpus, text):
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    source = [str(corpus.parent / "text.jsonl")]
    assert prepare(source, corpus, **SETTINGS) == corpus
    for change, value in (("seed", 1), ("context_length", 16), ("tokenizer", "bpe:300"), ("packing", "best_fit")):
        with pytest.raises(UserError, match=f"was prepared otherwise .*{change}: "):
            prepare(source, corpus, **{**SETTINGS, change: value})
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before


def test_resume_keeps_finished_shards(corpus, text, tmp_path, monkeypatch):
    make, made = shards.make_shard, []

    def make_some(job):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.file)
        return make(job)

    monkeypatch.setattr(shards, "make_shard", make_some)
    with pytest.raises(KeyboardInterrupt):
        prepare([text], tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"unfinished preparation with other settings \(seed: 0 -> 5\)"):
        prepare([text], tmp_path / "out", **SETTINGS, seed=5)
    again = []
    monkeypatch.setattr(shards, "make_shard", lambda job: again.append(job.file) or make(job))
    prepare([text], tmp_path / "out", **SETTINGS)
    assert not set(again) & set(made) and len(again) > 0
    assert read_manifest(tmp_path / "out").hash == read_manifest(corpus).hash


def test_kill_then_the_same_command(corpus, text, tmp_path):
    command = (
        "import sys, time; from pathlib import Path; from mor_jax.data import shards, prepare as p\n"
        "make = shards.make_shard\n"
        "shards.make_shard = lambda job: (make(job), time.sleep(0.2))[0]\n"
        f"p.prepare([{text!r}], Path({str(tmp_path / 'out')!r}), **{SETTINGS!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": _source_path()})
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial").glob("*.shard.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    prepare([text], tmp_path / "out", **SETTINGS)
    assert read_manifest(tmp_path / "out").hash == read_manifest(corpus).hash


def test_a_kill_while_finishing_leaves_nothing_stale(corpus, text, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "remove_records", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([text], tmp_path / "out", **{**SETTINGS, "context_length": 16})
    prepare([text], tmp_path / "out", **SETTINGS)
    assert read_manifest(tmp_path / "out").hash == read_manifest(corpus).hash
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in corpus.iterdir()}


def _source_path() -> str:
    return str(Path(shards.__file__).parents[2])


def test_a_trained_bpe_and_best_fit(text, tmp_path):
    made = prepare(
        [text], tmp_path / "out", tokenizer="bpe:300", context_length=CONTEXT, packing="best_fit", validation_share=0.0
    )
    opened = open_corpus(made)
    assert opened.tokenizer.vocab_size == 300 and opened.manifest.totals("validation") is None
    totals = opened.manifest.splits[0]
    assert totals.bytes_per_token > 1.5 and totals.documents == 60


def test_few_documents_still_give_a_validation_split(tmp_path, write_jsonl):
    text = write_jsonl(tmp_path / "few.jsonl", count=2)
    made = prepare([str(text)], tmp_path / "out", tokenizer="bytes", context_length=CONTEXT, validation_share=0.01)
    assert [totals.documents for totals in read_manifest(made).splits] == [1, 1]


def test_a_seed_that_is_none_leaves_no_folder(text, tmp_path):
    with pytest.raises(UserError, match=r"seed=99999999999 is outside 0\.\.2\^32-1"):
        prepare([text], tmp_path / "out", tokenizer="bytes", seed=99999999999)
    assert not list(tmp_path.glob("out*"))


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "one.txt").write_text("just one")
    with pytest.raises(UserError, match="single document cannot be split"):
        prepare([str(tmp_path / "one.txt")], tmp_path / "out", tokenizer="bytes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "context_length=0"),
        ({"validation_share": 1.0}, r"validation_share=1.0 is outside \[0, 1\)"),
        ({"workers": -1}, "workers=-1"),
        ({"tokenizer": "nope"}, "tokenizer='nope'"),
    ],
)
def test_bad_settings(change, message, text, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare([text], tmp_path / "out", **{**SETTINGS, **change})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_folder_of_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"holds files but no manifest\.json"):
        prepare([text], tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match="is not a folder"):
        prepare([text], tmp_path / "out" / "letter.txt", **SETTINGS)


def test_unwritable_place(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'file' / 'out'))}: "):
        prepare([text], tmp_path / "file" / "out", **SETTINGS)


def test_damage_of_an_input_is_not_the_outputs(text, tmp_path, monkeypatch):
    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "documents", lambda self: read_documents(tmp_path / "gone.jsonl"))
        with pytest.raises(UserError, match=r"input .*gone\.jsonl: no such file"):
            prepare([text], tmp_path / "out", **SETTINGS)
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(spill._Appender, "_flush", lambda *_: fail(None))  # the disk of the output
    out = re.escape(str(tmp_path / "out"))
    with pytest.raises(UserError, match=rf"^{out}: .*Input/output error; what is finished is kept"):
        prepare([text], tmp_path / "out", **SETTINGS)
    assert (tmp_path / "out.partial").is_dir()


def test_truncated_input_leaves_nothing_that_looks_complete(text, tmp_path):
    whole = Path(text).read_text()
    Path(text).write_text(whole[:-20])
    with pytest.raises(UserError, match="line 60"):
        prepare([text], tmp_path / "out", **SETTINGS)
    assert not list(tmp_path.glob("out*"))
    Path(text).write_text(whole)
    assert read_manifest(prepare([text], tmp_path / "out", **SETTINGS)).hash


def test_the_held_out_split_may_be_given(text, tmp_path, write_jsonl, caplog):
    lines = Path(text).read_text().splitlines(keepends=True)
    other = Path(write_jsonl(tmp_path / "other.jsonl", count=3, word="dolor"))
    other.write_text(other.read_text() + "".join(lines[:5]))  # 5 of the 60 are held out
    settings = {name: value for name, value in SETTINGS.items() if name != "validation_share"}
    with caplog.at_level("INFO"):
        made = prepare([text], tmp_path / "out", validation=[str(other)], **settings)
    assert "5 documents are left out of the train split" in caplog.text
    manifest = read_manifest(made)
    assert {totals.split: totals.documents for totals in manifest.splits} == {"train": 55, "validation": 8}
    assert manifest.settings.validation == ("other.jsonl",) and manifest.settings.validation_share == 0
    assert prepare([text], made, validation=[str(other)], **settings) == made
    with pytest.raises(UserError, match=r"was prepared otherwise .*validation"):
        prepare([text], made, **settings)
    with pytest.raises(UserError, match=r"validation_share=0.2 and validation=\['v'\] both say what is held out"):
        prepare([text], tmp_path / "both", validation=["v"], **SETTINGS)
    with pytest.raises(UserError, match="validation has every document of the inputs"):
        prepare([text], tmp_path / "all", validation=[text], **settings)
    assert not list(tmp_path.glob("all*"))

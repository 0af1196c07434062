"""Paths in a bucket: run folder, metrics, pictures and data, on a bucket in memory (Orbax's own storage is not run)."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import fake_bucket
from mor_jax.config import Config, DataConfig, TrainConfig
from mor_jax.config import io as config_io
from mor_jax.data.corpus import open_corpora
from mor_jax.data.prepare import prepare
from mor_jax.errors import UserError
from mor_jax.evaluate.plots import plot_loss
from mor_jax.paths import is_remote, to_path
from mor_jax.runs import metrics
from mor_jax.runs.folder import check_run_folder, claim_run_folder
from mor_jax.runs.metrics import BucketJsonlWriter, read_metrics
from mor_jax.runs.trackers import make_writers


@pytest.fixture
def bucket(monkeypatch) -> Path:
    """A folder in an empty bucket."""
    fake_bucket.install(monkeypatch)
    return to_path("gs://bucket/team")


def test_local_paths_stay_pathlib_and_other_schemes_are_refused(tmp_path):
    assert to_path(str(tmp_path)) == tmp_path and not is_remote(to_path("runs"))
    with pytest.raises(UserError, match=r"'s3://b/x' is neither a local path nor gs://"):
        to_path("s3://b/x")


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(fake_bucket.registered(), "gcs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"'gs://b/x' needs gcsfs: pip install -e '\.\[gcs\]'"):
        to_path("gs://b/x")


def test_a_run_folder_in_a_bucket_is_claimed_and_defended(bucket):
    config = Config(train=TrainConfig(runs=str(bucket / "runs"), name="a"))
    folder = check_run_folder(config)
    assert is_remote(folder) and str(folder) == "gs://bucket/team/runs/a"
    claim_run_folder(config)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert config_io.load(Config, folder / "config.json") == config
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=3))
    with pytest.raises(UserError, match=r"train.seed: 0 -> 3"):
        check_run_folder(other)


def test_metrics_in_a_bucket_are_there_after_a_flush_and_resume_from_a_step(bucket, monkeypatch):
    writers = make_writers(bucket, restored_step=0, trackers=("tensorboard",))
    for step in (1, 2, 3):
        writers.write(step, {"loss": 1.0 / step})
    assert read_metrics(bucket / "metrics.jsonl") == []
    writers.flush()
    assert [line["step"] for line in read_metrics(bucket / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.setattr(metrics, "_BUCKET_SECONDS", -1.0)
    resumed = BucketJsonlWriter(bucket / "metrics.jsonl", 2)
    resumed.write(3, {"loss": 0.5})
    assert [json.loads(line)["loss"] for line in (bucket / "metrics.jsonl").read_text().splitlines()] == [1.0, 0.5, 0.5]


def test_a_picture_in_a_bucket(bucket):
    plot_loss(bucket / "loss.png", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "title")
    assert (bucket / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_corpus_in_a_bucket_is_copied_once_and_gone_on_with(bucket, tmp_path):
    lines = [json.dumps({"text": f"This is document {i}. " * 20}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    local = prepare([str(tmp_path / "text.jsonl")], tmp_path / "corpus", tokenizer="bytes", context_length=32)
    remote = bucket / "corpus"
    remote.mkdir(parents=True)
    for path in local.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    config = DataConfig(source=str(remote), cache=str(tmp_path / "cache"))
    (corpus,) = open_corpora(config, 32, 257)
    assert corpus.folder.parent == tmp_path / "cache" and corpus.folder.name.startswith("corpus-")
    copied, wanted = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (corpus.folder, local))
    assert copied == wanted
    for path in remote.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    (again,) = open_corpora(config, 32, 257)
    assert again.folder == corpus.folder
    half = corpus.folder.rename(corpus.folder.with_name(corpus.folder.name + ".partial"))
    shard = next(half.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(UserError, match=r"corpus' could not be copied to .*\.partial"):
        open_corpora(config, 32, 257)


def test_a_bucket_without_a_corpus_is_named(bucket, tmp_path):
    with pytest.raises(UserError, match=r"data.source='gs://bucket/nothing' has no readable manifest.json"):
        open_corpora(DataConfig(source="gs://bucket/nothing", cache=str(tmp_path)), 32, 257)

"""Restoring a run and making its pictures again, for its own text and for any other."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from evaluation_examples import TEXT, HeldOut, T, batch, config

from mor_jax.config import MeshConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.evaluate import inspect
from mor_jax.evaluate.validation import validation_losses
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.restore import restore_run
from mor_jax.runs.state import init_train_state

CONFIG = dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=2))


@pytest.fixture(scope="module")
def state():
    return init_train_state(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:2]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    config_io.save(CONFIG, folder / "config.json")
    Tokenizer.bytes_level().save(folder / "tokenizer.json")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5.5}) + "\n")
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(state, data_step=0, data_hash="tiny")
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def test_a_sharded_run_is_restored_on_one_device(run, state):
    restored = restore_run(run)
    assert restored.step == 0 and restored.tokenizer.vocab_size == 257
    for was, now in zip(jax.tree.leaves(state.params), jax.tree.leaves(restored.params), strict=True):
        np.testing.assert_array_equal(was, now)
        assert len(now.devices()) == 1


def test_a_run_of_another_device_is_measured_here(run):
    """Kernels that were asked for by name, and that this device lacks."""
    perf = dataclasses.replace(CONFIG.perf, attention_backend="mosaic_tpu", fusion="triton")
    config_io.save(dataclasses.replace(CONFIG, perf=perf), run / "config.json")
    restored = restore_run(run)
    losses = validation_losses(restored.weights, restored.config.perf, HeldOut(batch(0)), 2)
    assert losses["validation_tokens"] > 0


def test_any_text_can_be_inspected(run):
    written = inspect.inspect_run(run, text=TEXT)
    assert [path.relative_to(run).as_posix() for path in written] == [
        f"inspect/{name}" for name in ("loss.png", "depth.png", "routing.html")
    ]
    page = (run / "inspect" / "routing.html").read_text(encoding="utf-8")
    shown = min(len(TEXT.encode()), 2048)
    assert page.count('title="token') == 2 * shown and "<h1>tiny</h1>" in page


def test_the_held_out_text_is_the_default(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "held_out", lambda config: HeldOut(batch(0)))
    written = inspect.inspect_run(run)
    assert written == [run / "loss.png", run / "depth.png", run / "routing.html"]
    assert (run / "routing.html").read_text(encoding="utf-8").count('title="token') == 2 * 2 * T
    elsewhere = inspect.inspect_run(run, output=tmp_path / "other")
    assert elsewhere[0] == tmp_path / "other" / "loss.png" and elsewhere[0].exists()


def test_a_run_can_be_evaluated_again(run, monkeypatch, state):
    monkeypatch.setattr(inspect, "held_out", lambda config: HeldOut(batch(0), batch(1)))
    restored, losses = inspect.evaluate_run(run)
    assert losses == validation_losses(restored.weights, restored.config.perf, HeldOut(batch(0), batch(1)), 4)
    assert inspect.evaluate_run(run, rows=2)[1]["validation_tokens"] == losses["validation_tokens"] // 2


def test_data_of_another_tokenizer_than_the_runs_are_refused(run, monkeypatch):
    other = HeldOut(batch(0))
    monkeypatch.setattr(other, "tokenizer", SimpleNamespace(hash="another"))
    monkeypatch.setattr(inspect, "make_dataset", lambda data, **rest: other)
    with pytest.raises(UserError, match=r"data.source='.*' gives tokens of another tokenizer than the run's"):
        inspect.evaluate_run(run)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "checkpoints"])
def test_a_folder_that_is_no_run_is_refused_by_name(run, missing):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=missing.split(".")[0]):
        inspect.inspect_run(run, text=TEXT)
    assert not path.exists() and not (run / "inspect").exists()


def test_mistakes_write_nothing(run, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        inspect.inspect_run(tmp_path / "absent")
    with pytest.raises(UserError, match="empty"):
        inspect.inspect_run(run, text="")
    small = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=100))
    config_io.save(small, run / "config.json")
    with pytest.raises(UserError, match=r"vocab_size=257.*model.vocab_size=100"):
        inspect.inspect_run(run, text=TEXT)
    assert not (run / "inspect").exists()

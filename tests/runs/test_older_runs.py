"""What commit 8ae4020 wrote still opens: its checkpoint for evaluation and for training, and its prepared corpus."""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_runs import TIMINGS, read_lines, with_train  # pyright: ignore[reportMissingImports]

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.evaluate.inspect import evaluate_run
from mor_jax.infer.language_model import load
from mor_jax.train.loop import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "commit-8ae4020"
WRITTEN = 4
SINCE = ("boundaries_R", "threshold_accuracy_R", "validation_gap")
"""Entries that the running boundaries made or changed; so is all that begins with ``validation_threshold``."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy in the working directory: the run's configuration names its corpus from there."""
    copy = shutil.copytree(FIXTURE, tmp_path / "fixture")
    monkeypatch.chdir(copy)
    return copy


def _machine() -> dict[str, str]:
    """What decides how sums are rounded: the compiler and the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])]
    first = {line[0].strip(): line[1].strip() for line in reversed(lines) if len(line) == 2}
    processor = ", ".join(first.get(name, "") for name in ("model name", "cpu family", "model"))
    return {"jax": version("jax"), "jaxlib": version("jaxlib"), "processor": processor}


def _assert_same(found: Any, wanted: Any) -> None:
    """Bitwise where the fixture was written, elsewhere up to the rounding of other instructions."""
    if _machine() == json.loads((FIXTURE / "wanted" / "machine.json").read_text()):
        assert found == wanted
        return
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
        assert found[name] == close, name


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def _without_boundaries(line: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in line.items() if n not in SINCE and not n.startswith("validation_threshold")}


def _train(name: str) -> list[dict[str, Any]]:
    config = with_train(config_io.load(Config, FIXTURE / "run" / "config.json"), name=name)
    return read_lines(train(config, devices=jax.devices()[:1]))


def test_its_weights_evaluate_and_generate_as_before(folder, caplog):
    caplog.set_level("INFO")
    run, losses = evaluate_run(folder / "run")
    assert run.step == WRITTEN and run.boundaries is None
    assert "its training kept no running boundaries" in caplog.text
    wanted = json.loads((folder / "wanted" / "eval.json").read_text())
    _assert_same(losses, {name: wanted[name] for name in wanted.keys() - {"run", "step", "boundaries"}})
    (completion,) = load(folder / "run").generate("Two and", max_tokens=12)
    wanted = json.loads((folder / "wanted" / "generate.json").read_text())
    _assert_same(dataclasses.asdict(completion), wanted)


def test_its_training_goes_on_as_it_would_have_and_its_running_boundaries_begin(folder, caplog):
    caplog.set_level("INFO")
    before, after = _lines(folder / "run" / "metrics.jsonl"), _lines(folder / "wanted" / "metrics.jsonl")
    found = _train("run")
    assert found[:WRITTEN] == before
    assert "the checkpoint holds no running boundaries: they begin anew" in caplog.text
    for line, wanted in zip(found[WRITTEN:], after, strict=True):
        _assert_same(_without_boundaries(line), _without_boundaries(wanted))
        assert line["boundaries_R"][0] == 0.0 != line["boundaries_R"][1]
    run, losses = evaluate_run(folder / "run")
    assert run.boundaries == tuple(found[-1]["boundaries_R"])
    assert losses["validation_gap"] == found[-1]["validation_gap"] != after[-1]["validation_gap"]


def test_its_corpus_trains_the_same_run_again(folder):
    wanted = _lines(folder / "run" / "metrics.jsonl") + _lines(folder / "wanted" / "metrics.jsonl")
    for line, old in zip(_train("again"), wanted, strict=True):
        _assert_same(_without_boundaries(line), _without_boundaries(old))

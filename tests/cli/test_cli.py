"""The console command: what it prints and leaves, and its exit codes."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mor_jax import presets
from mor_jax.config import Config
from mor_jax.config.io import load
from mor_jax.model.flops import count_parameters
from mor_jax.sweep.measurement import measurer


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_usage_lists_the_commands(mor, arguments):
    outcome = mor(*arguments)
    assert outcome.code == (0 if arguments else 2)
    for command in ("train", "presets", "prepare", "eval", "inspect"):
        assert f"\n  {command} " in outcome.out


@pytest.mark.parametrize("command", ["train", "prepare", "eval", "inspect", "presets"])
def test_every_command_has_help(mor, command):
    outcome = mor(command, "--help")
    assert outcome.code == 0 and f"mor {command}" in outcome.out and outcome.err == ""


def test_help_of_a_preset_explains_the_fields(mor):
    outcome = mor("train", "debug", "--help")
    assert outcome.code == 0
    for flag in ("--train.steps", "--model.num-heads", "--model.recursion.num-recursions"):
        assert flag in outcome.out
    assert "how often the shared block is applied" in " ".join(outcome.out.split())


def test_presets_as_json(mor):
    outcome = mor("presets", "debug", "--json")
    (row,) = json.loads(outcome.out)
    model = presets.get("debug").config.model
    assert outcome.code == 0 and row["name"] == "debug" and row["parameters"] == count_parameters(model).total
    assert row["tokens"] == 40 * 8 * 128 and row["train_flops_per_token"] > 3 * row["forward_flops_per_token"]


def test_presets_as_a_table(mor):
    outcome = mor("presets", "360m-expert-r3")
    assert outcome.code == 0
    names = [word for word in outcome.out.split() if word.startswith("mor-")]
    assert names == ["mor-360m-expert-r3", "mor-360m-expert-r3-share"]
    assert "165 M" in outcome.out or "166 M" in outcome.out  # 118M without the embedding's 47M


def test_prepare_prints_the_folder(mor, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} " * 60 for i in range(2000)))
    arguments = (text, "--out", tmp_path / "out", "--tokenizer", "bytes", "--context-length", 64)
    outcome = mor("prepare", *arguments)
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, str(tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_train_leaves_the_whole_run_and_prints_its_folder_last(trained):
    folder, _, outcome = trained
    assert outcome.code == 0 and outcome.out.splitlines()[-1] == str(folder)
    names = {"config.json", "metrics.jsonl", "tokenizer.json", "loss.png", "depth.png", "routing.html", "checkpoints"}
    assert names <= {path.name for path in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"loss", "tokens_per_second"} <= line.keys() for line in lines)
    config = load(Config, folder / "config.json")
    assert (config.preset, config.model.d_model, config.train.steps) == ("debug", 16, 4)


def test_the_same_command_again_has_nothing_to_do(trained, mor):
    before = (trained.folder / "metrics.jsonl").read_bytes()
    outcome = mor("train", *trained.arguments)
    assert outcome.code == 0 and "continued from step 4" in outcome.out + outcome.err
    assert (trained.folder / "metrics.jsonl").read_bytes() == before


def test_eval_measures_both_modes(trained, mor):
    outcome = mor("eval", trained.folder, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["step"] == 4
    last = json.loads((trained.folder / "metrics.jsonl").read_text().splitlines()[-1])
    for mode in ("topk", "threshold"):
        key = f"validation_{mode}_bits_per_byte"
        assert found[key] == pytest.approx(last[key], rel=1e-5)


def test_calibrated_boundaries_serve_texts_and_tasks(trained, mor, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("counting sheep, counting goats, " * 8)
    found = json.loads(mor("eval", trained.folder, "--text", text, "--stride", "32", "--calibrate", "8", "--json").out)
    boundaries = json.loads(mor("eval", trained.folder, "--calibrate", "8", "--json").out)["boundaries"]
    assert found["boundaries"] == boundaries and any(boundaries[1:])
    measure = measurer((text,), depth_curve=False, calibration_rows=8)
    assert measure is not None
    measured = measure(trained.folder)
    assert measured["calibrated"]["text"]["sources"] == found["sources"] != measured["text"]["sources"]
    assert sum(measured["calibrated"]["tokens_per_depth"]) == pytest.approx(1.0)
    pytest.importorskip("lm_eval")
    with gzip.open(tmp_path / "copa.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": "q because", "choices": ["a", "b"], "gold": 1}) + "\n")
    tasks = mor("eval", trained.folder, "--tasks", "copa", "--evalsets", tmp_path, "--calibrate", "8", "--json")
    assert json.loads(tasks.out)["boundaries"] == boundaries


def test_inspect_colours_any_text(trained, mor, tmp_path):
    outcome = mor("inspect", trained.folder, "--text", "one sheep, two sheep", "--out", tmp_path)
    assert outcome.code == 0
    written = {tmp_path / name for name in ("loss.png", "depth.png", "routing.html")}
    assert {Path(line) for line in outcome.out.splitlines()} == written == set(tmp_path.iterdir())
    page = (tmp_path / "routing.html").read_text()
    assert page.count("<span") >= 20 and "counting" not in page  # the given text, byte by byte, not the held-out one


def test_as_a_process_of_its_own():
    """`python -m mor_jax.cli`: the exit code reaches the shell, the message is one line, and nothing else appears."""
    command = [sys.executable, "-m", "mor_jax.cli", "train", "mor-360m-exprt-r3"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2 and finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("mor train: unknown preset 'mor-360m-exprt-r3'; did you mean 'mor-360m-expert-r3'?")

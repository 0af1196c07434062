"""Bad input ends in one message, exit code 2, no traceback, and nothing lost or written."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import CONTEXT, TINY, Mor, Outcome, Trained
from mor_jax.cli import generate
from mor_jax.cli.generate import GenerateArguments
from mor_jax.data.prepare import prepare
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError


def _refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one message on stderr that holds the words, and no traceback."""
    text = " ".join(outcome.err.replace("│", " ").split())  # a terminal gets boxes
    assert outcome.code == 2, text
    assert "Traceback" not in outcome.err and outcome.out == ""
    for word in words:
        assert word in text
    messages = [line for line in outcome.err.splitlines() if line.startswith("mor ")]
    assert len(messages) + text.count("For full helptext") == 1, outcome.err


def _refused_after(outcome: Outcome, *words: str) -> None:
    """As ``_refused``, but lines of the log may have come before."""
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert all(word in outcome.err.splitlines()[-1] for word in words), outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), ("unknown command 'trian'", "did you mean 'train'?")),
        (("train",), ("usage: mor train PRESET",)),
        (("train", "dbug"), ("unknown preset 'dbug'", "did you mean 'debug'?")),
        (("train", "debug", "--train.step", "3"), ("--train.steps",)),
        (("train", "debug", "--model.num-head", "3"), ("--model.num-heads",)),
        (("train", "debug", "--train.steps", "many"), ("--train.steps",)),
        (("train", "debug", "--model.dtype", "float16"), ("--model.dtype",)),
        (("train", "debug", "--model.num-heads", "9"), ("num_heads=9 is not divisible by num_kv_heads=2",)),
        (
            ("train", "debug", "--model.routing.capacities", "0.5", "1.0"),
            ("capacities=(0.5, 1.0) must not ascend",),
        ),
        (("train", "debug", "--model.routing.capacities", "1.0", "0.0"), ("0.0 is outside (0, 1]",)),
        (
            ("train", "debug", "--model.num-layers", "3"),
            ("num_layers=3 is too few for sharing='middle_cycle' with num_recursions=2: at least 4",),
        ),
        (("train", "debug", "--train.growth", "0.5:one"), ("--train.growth", "SHARE:RECURSIONS[:routed]")),
        (("train", "debug", "--train.growth", "0.5:3"), ("train.growth=0.5:3: 3 is outside 1..num_recursions=2",)),
        (("train", "debug", "--data.seed", "-1"), ("data.seed=-1 is outside 0..2^32-1",)),
        (("train", "debug", "--train.seed", "4294967296"), ("train.seed=4294967296 is outside",)),
        (("prepare", "--out", "x"), ("no input given",)),
        (("prepare", "nowhere.txt", "--out", "x"), ("nowhere.txt: no such file",)),
        (("eval", "nowhere"), ("nowhere is not a run folder",)),
        (("eval", "nowhere", "--stride", "4"), ("--stride needs --text",)),
        (("eval", "nowhere", "--tasks", "copa", "--within-documents"), ("--within-documents is for losses",)),
        (("eval", "nowhere", "--evalsets", "x"), ("--evalsets needs --tasks",)),
        (("eval", "nowhere", "--limit", "3"), ("--limit needs --tasks",)),
        (("eval", "nowhere", "--batch-size", "3"), ("--batch-size needs --tasks",)),
        (("eval", "nowhere", "--text", "a.txt", "--rows", "3"), ("--rows is for the held-out loss",)),
        (("eval", "nowhere", "--rows", "0"), ("--rows 0 must be positive",)),
        (("eval", "nowhere", "--calibrate", "-1"), ("--calibrate -1 must not be negative",)),
        (("sweep", "absent.py"), ("absent.py is not a sweep file",)),
        (("presets", "360n"), ("no preset's name contains '360n'",)),
        (("generate", "nowhere", "--mesh.tensor", "0"), ("mesh.tensor=0 must be positive",)),
        (
            ("generate", "nowhere", "--prompt", "a", "--mesh.data", "3", "--mesh.tensor", "3"),
            ("mesh.data=3 x mesh.tensor=3 = 9 devices, but there are 8",),
        ),
        (("inspect", "nowhere"), ("nowhere is not a run folder",)),
        (("inspect", "nowhere", "--text", "a", "--file", "b"), ("--text and --file exclude each other",)),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_arguments(mor: Mor, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = mor(*arguments)
    if arguments in (("train",), ("trian",)):  # these also print the usage
        assert outcome.code == 2 and all(word in outcome.err for word in words)
    else:
        _refused(outcome, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", bytes(range(256)) * 9, "binary"),
        ("nul.txt", b"text\0text", "NUL bytes"),
        ("cut.jsonl", b'{"text": "whole"}\n{"text": "cu', "not a JSON object"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00", "truncated"),
        ("table.csv", b"a,b\n", "unknown kind of file"),
        ("cut.parquet", b"PAR1\x00", "parquet"),
        ("deep.jsonl", b'{"text": "whole"}\n' + b'{"a":' * 50_000 + b"\n", "line 2"),
    ],
)
def test_prepare(mor: Mor, name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    _refused(mor("prepare", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "bytes"), name, words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_folder_with_the_name_of_a_built_in_source(mor: Mor, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    arguments = {"prepare": ("docs", "--out", "out"), "train": ("debug", "--data.source", "docs")}[command]
    _refused(mor(command, *arguments), "'./docs' for the folder", "'builtin:docs' for the built-in one")
    if command == "train":
        _refused(mor("train", "debug", "--data.source=a, docs"), "'builtin:docs' for the built-in one")
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_prompts_that_are_no_text(mor: Mor, tmp_path, monkeypatch):
    surrogate = "prompt 2: character 3 is a lone surrogate (U+DCFF, half of a pair, or the byte 0xff"
    _refused(mor("generate", "nowhere", "--prompt", "fine", "hi\udcff"), surrogate)
    _refused(mor("generate", "nowhere", "--prompt", "\ud83d"), "prompt 1: character 1 is a lone surrogate (U+D83D")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\xff"), "utf-8"))
    _refused(mor("generate", "nowhere"), "standard input is not utf-8 text")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\xff"), "utf-8", "surrogateescape"))
    _refused(mor("generate", "nowhere"), "standard input: character 3 is a lone surrogate")
    (tmp_path / "prompts").write_bytes(b"hi\xff\n")
    _refused(mor("generate", "nowhere", "--file", tmp_path / "prompts"), "not a readable UTF-8 text")
    with pytest.raises(UserError, match="text to encode: character 1 is a lone surrogate"):
        Tokenizer.bytes_level().encode("\ud83d")


def test_prompts_of_a_file_end_with_its_lines_only(tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffone\u2028still\x0cone\r\n\ntwo\n".encode())
    options = GenerateArguments(Path("nowhere"), file=tmp_path / "prompts")
    assert generate._prompts(options) == ["one\u2028still\x0cone", "", "two"]


def _train(mor: Mor, corpus: Path, runs: Path, *overrides: Any) -> Outcome:
    return mor("train", "debug", *TINY, "--data.source", corpus, "--train.runs", runs, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--model.context-length", "64"), ("context_length=64", "32")),
        (("--model.vocab-size", "200"), ("vocab_size=200", "257")),
        (("--data.source", "nowhere"), ("data.source='nowhere'",)),
        (("--train.batch-size", "12"), ("train.batch_size=12", "data x fsdp = 8")),
        (("--mesh.tensor", "3"), ("mesh.tensor=3", "8 devices")),
        (("--perf.attention-backend", "cudnn"), ("perf.attention_backend='cudnn' needs a GPU",)),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_data_and_devices_that_do_not_fit_the_model(mor: Mor, corpus, overrides, words, tmp_path):
    _refused(_train(mor, corpus, tmp_path / "runs", *overrides), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["shard", "manifest", "empty manifest", "tokenizer"])
def test_a_corpus_that_disagrees_with_its_manifest(mor: Mor, corpus: Path, damage, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    if damage == "shard":
        path = next(path for path in broken.rglob("*") if "train" in path.name and path.is_file())
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "manifest":
        path = broken / "manifest.json"
        path.write_text(path.read_text().replace('"rows": ', '"rows": 1', 1))
    elif damage == "empty manifest":
        path = broken / "manifest.json"
        path.write_text("{}")
    else:
        path = broken / "tokenizer.json"
        path.unlink()
    _refused(_train(mor, broken, tmp_path / "runs"), path.name)
    assert not (tmp_path / "runs").exists()


def _copy(trained: Trained, runs: Path) -> tuple[str, ...]:
    """Copy the run and return the arguments that continue the copy."""
    shutil.copytree(trained.folder, runs / "tiny")
    return (*trained.arguments, "--train.runs", str(runs))


def test_a_run_folder_of_another_configuration_names_the_fields(trained: Trained, mor: Mor):
    before = sorted(path.name for path in trained.folder.iterdir())
    outcome = mor("train", *trained.arguments, "--model.d-ff", "48", "--optimizer.beta1", "0.8")
    _refused(outcome, "model.d_ff: 32 -> 48", "optimizer.beta1: 0.9 -> 0.8", "choose another --train.name")
    assert sorted(path.name for path in trained.folder.iterdir()) == before


def test_a_corpus_that_has_moved_is_the_same(trained: Trained, corpus: Path, mor: Mor, tmp_path):
    again = _copy(trained, tmp_path)
    moved = shutil.copytree(corpus, tmp_path / "moved, and renamed")
    outcome = mor("train", *again, "--data.source", moved)
    assert outcome.code == 0 and "continued from step 4" in outcome.out, outcome.err
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["data"]["source"] == str(moved)
    other = prepare([str(corpus.parent / "text.jsonl")], tmp_path / "other", tokenizer="bytes", context_length=CONTEXT)
    _refused_after(mor("train", *again, "--data.source", other), "was trained on other data", str(other))


def test_a_corpus_without_validation_trains(mor: Mor, tmp_path):
    (tmp_path / "one.txt").write_text("a single document " * 40)
    flags = ("--out", tmp_path / "corpus", "--tokenizer", "bytes", "--context-length", CONTEXT)
    _refused(mor("prepare", tmp_path / "one.txt", *flags), "or set validation_share=0")
    assert mor("prepare", tmp_path / "one.txt", *flags, "--validation-share", "0").code == 0
    outcome = _train(mor, tmp_path / "corpus", tmp_path / "runs", "--train.eval-every", "2")
    assert outcome.code == 0 and outcome.err.count("no validation, and no pictures") == 1, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "runs" / "debug" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert not any(name.startswith("validation") for line in lines for name in line)
    assert {path.name for path in (tmp_path / "runs" / "debug").glob("*.*") if path.suffix in (".png", ".html")} == {
        "loss.png"
    }
    _refused(mor("eval", tmp_path / "runs" / "debug"), "has no validation split")


def test_a_folder_that_cannot_be_written(mor: Mor, corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    _refused(_train(mor, corpus, tmp_path / "file"), "cannot be written", "Not a directory")

    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    _refused(_train(mor, corpus, tmp_path / "runs"), "cannot be written", "Permission denied")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", "file/x"), ("file", "cannot be used")),
        (("--results", "file/x.json", "--out", "sweep"), ("file", "cannot be used")),
        (("--text", "file", "absent.txt"), ("--text absent.txt: no such file",)),
        (("--calibrate", "-1"), ("calibration rows -1 must not be negative",)),
        (("--calibrate", "-1", "--list"), ("calibration rows -1 must not be negative",)),
        (("--share", "3/2", "--list"), ("share=3/2: the index must be in 0..1",)),
        (("--limit-seconds", "nan"), ("limit_seconds=nan is no time",)),
    ],
)
def test_a_sweep_is_refused_before_its_first_run(mor: Mor, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "sweep.json").write_text('{"runs": [{"name": "a"}]}')
    _refused(mor("sweep", "sweep.json", *flags), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sweep.json"]


def test_a_sweep_loads_the_weights_that_a_run_names(mor: Mor, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"init.source": "absent", "data.source": str(corpus), "model.context_length": CONTEXT}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{"name": "a", "set": changes}]}))
    _refused(mor("sweep", "sweep.json"), "absent is no folder")


def test_a_half_written_checkpoint_is_passed_over(trained: Trained, mor: Mor, tmp_path):
    _copy(trained, tmp_path)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.orbax-checkpoint-tmp-0")
    outcome = mor("eval", tmp_path / "tiny")
    assert outcome.code == 0 and outcome.out.startswith("step 2,")
    assert (checkpoints / "4.orbax-checkpoint-tmp-0").is_dir()  # it may be what a trainer is saving just now


def _truncate(step: Path) -> None:
    """Cut every array file of a checkpoint in half."""
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoints_are_named(trained: Trained, mor: Mor, tmp_path):
    _copy(trained, tmp_path)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    _truncate(checkpoints / "4")
    outcome = mor("eval", tmp_path / "tiny")
    assert outcome.code == 0 and outcome.out.startswith("step 2,")
    assert "checkpoint 4 is damaged and skipped" in outcome.err and "Traceback" not in outcome.err
    _truncate(checkpoints / "2")
    outcome = mor("eval", tmp_path / "tiny")
    assert outcome.code == 2 and "all checkpoints are damaged (steps [4, 2])" in outcome.err
    assert "Traceback" not in outcome.err and (checkpoints / "2").is_dir() and (checkpoints / "4").is_dir()


def test_a_run_without_checkpoints_or_with_a_foreign_tokenizer(trained: Trained, mor: Mor, tmp_path):
    _copy(trained, tmp_path)
    run = tmp_path / "tiny"
    (run / "tokenizer.json").write_text("{}")
    _refused(mor("eval", run), "tokenizer.json")
    shutil.copy(trained.folder / "tokenizer.json", run)
    shutil.rmtree(run / "checkpoints")
    _refused(mor("inspect", run), "holds no checkpoints")
    (run / "config.json").write_text('{"model_type": "llama"}')
    _refused(mor("eval", run), "holds no checkpoints (a model of another kind: `mor convert` it first)")


def test_text_to_inspect(trained: Trained, mor: Mor, tmp_path):
    _refused(mor("inspect", trained.folder, "--text", ""), "the text to inspect is empty")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    _refused(mor("inspect", trained.folder, "--file", tmp_path / "binary.txt"), "not a readable UTF-8 text")

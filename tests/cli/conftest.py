"""The console command in this process, and one tiny corpus and run that all tests of it share."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from mor_jax.cli import main
from mor_jax.data.prepare import prepare

CONTEXT = 32
TINY = (
    "--model.vocab-size", "257", "--model.context-length", str(CONTEXT), "--model.d-model", "16",
    "--model.num-heads", "2", "--model.num-kv-heads", "1", "--model.head-dim", "8", "--model.d-ff", "32",
    "--optimizer.warmup-steps", "1", "--train.steps", "4", "--train.batch-size", "8", "--train.save-every", "2",
    "--train.eval-every", "0", "--train.eval-rows", "8", "--train.log-every", "1", "--perf.loss-chunk", "32",
)  # fmt: skip


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Mor = Callable[..., Outcome]


def run_command(capture: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run ``mor ARGUMENTS`` here."""
    capture.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    captured = capture.readouterr()
    return Outcome(code, captured.out, captured.err)


@contextlib.contextmanager
def fresh_logging() -> Iterator[None]:
    """The command sends log lines to its stderr; give it a logger that nobody has set up, and take it away again."""
    logger = logging.getLogger("mor_jax")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers.clear()
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command also sets the compilation cache of its process: it stays where the tests' is."""
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setenv("MOR_CACHE", cache)
    with fresh_logging():
        yield


@pytest.fixture
def mor(capsys: pytest.CaptureFixture[str]) -> Mor:
    """Run ``mor``."""
    return lambda *arguments: run_command(capsys, *arguments)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus: 40 short documents, as bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f'{{"text": "{"counting sheep " * 6}number {i}"}}' for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    out, text = folder / "corpus", str(folder / "text.jsonl")
    return prepare([text], out, tokenizer="bytes", context_length=CONTEXT, validation_share=0.3)


class Trained(NamedTuple):
    """A finished run and how it was started."""

    folder: Path
    arguments: tuple[str, ...]
    outcome: Outcome


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``mor train debug`` with tiny overrides, run once."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ("debug", *TINY, "--data.source", str(corpus), "--train.runs", str(runs), "--train.name", "tiny")
    cache, patch = jax.config.jax_compilation_cache_dir, pytest.MonkeyPatch()  # pyright: ignore
    patch.setenv("MOR_CACHE", cache)
    out, err = io.StringIO(), io.StringIO()
    with fresh_logging(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", *arguments])
    patch.undo()
    return Trained(runs / "tiny", arguments, Outcome(code, out.getvalue(), err.getvalue()))

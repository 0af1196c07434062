"""Readers that go away, and terminals that cannot show a text."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import mor_jax
from mor_jax.cli import main


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"]], ids=" ".join)
def test_a_closed_pipe_ends_quietly(arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(mor_jax.__file__).parents[1])}
    command = [sys.executable, "-m", "mor_jax.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        lines = process.stderr.read().splitlines()
    assert all(line.startswith(b"mor: ") for line in lines), lines  # of the log
    assert process.returncode == 141


def test_what_rich_makes_of_a_closed_pipe(monkeypatch):
    def run(arguments):
        console = Console(file=sys.stdout)
        try:
            raise BrokenPipeError(32, "Broken pipe")
        except BrokenPipeError:
            monkeypatch.setattr("os.dup2", lambda *_: None)  # it lays /dev/null over stdout
            console.on_broken_pipe()

    monkeypatch.setattr("mor_jax.cli.presets.run", run)
    assert main(["presets"]) == 141


def test_another_broken_pipe_is_a_fault(monkeypatch):
    def fail(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mor_jax.cli.presets.run", fail)
    with pytest.raises(BrokenPipeError):
        main(["presets"])


def test_what_a_terminal_cannot_show_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a text\n" * 9)
    ascii_terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_terminal)
    out = tmp_path / "größe"
    flags = ["--tokenizer", "bytes", "--context-length", "8", "--validation-share", "0"]
    assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(out), *flags]) == 0
    ascii_terminal.flush()
    shown = ascii_terminal.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.decode() == f"{tmp_path}/gr??e\n" and out.is_dir()

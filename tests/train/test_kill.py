"""Sixty steps straight = sixty steps with two ``kill -9``, in processes of their own: parameters, metrics, batches."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import read_lines, saved_fingerprints

STEPS = 60
SCRIPT = """
import sys, time
from pathlib import Path
from tiny_runs import dataset_maker, tiny_config
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import GrowthStage
from mor_jax.train.loop import train

if __name__ == "__main__":
    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    growth = tuple(GrowthStage.parse(word) for word in sys.argv[3:])
    config = tiny_config(folder, steps=60, save_every=10, eval_every=20, growth=growth)
    make = dataset_maker(config, folder / "batches.txt")

    def make_slow(*arguments, **keywords):
        dataset = make(*arguments, **keywords)
        batch = dataset.batch
        dataset.batch = lambda step: (time.sleep(pause), batch(step))[1]
        return dataset

    enable_compilation_cache()
    print(train(config, make_dataset=make_slow))
"""


def _start(folder: Path, cache: Path, pause: float, growth: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": path, "MOR_CACHE": str(cache)}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause), *growth]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _interrupt(process: subprocess.Popen[str], folder: Path, lines: int, number: signal.Signals) -> str:
    """Send a signal once metrics.jsonl has so many lines; return what the process printed."""
    path, deadline = folder / "tiny" / "metrics.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def _finish(folder: Path, cache: Path, growth: tuple[str, ...] = ()) -> None:
    process = _start(folder, cache, 0.0, growth)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == str(folder / "tiny")


def _batches(folder: Path) -> set[str]:
    return set((folder / "batches.txt").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("growth", "kills"), [((), (33, 47)), (("0.5:1",), (30, 31))], ids=["", "growth"])
def test_two_kills_change_nothing(tmp_path, growth, kills):
    """Under growth the router enters with step 31: the first kill comes beside the save of step 30."""
    straight, killed, cache = tmp_path / "straight", tmp_path / "killed", tmp_path / "cache"
    _finish(straight, cache, growth)
    for lines in kills:
        process = _start(killed, cache, 0.05, growth)
        _interrupt(process, killed, lines, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    _finish(killed, cache, growth)
    assert len(read_lines(killed / "tiny")) == STEPS
    assert read_lines(killed / "tiny") == read_lines(straight / "tiny")
    assert saved_fingerprints(killed / "tiny", STEPS) == saved_fingerprints(straight / "tiny", STEPS)
    assert _batches(killed) == _batches(straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(tmp_path, number):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    process = _start(folder, cache, 0.05)
    output = _interrupt(process, folder, 5, number)
    assert process.returncode == 0, output
    assert f"{number.name}: saved at step" in output
    assert output.splitlines()[-1] == str(folder / "tiny")
    lines = read_lines(folder / "tiny")
    assert [int(path.name) for path in (folder / "tiny" / "checkpoints").iterdir()] == [lines[-1]["step"]]

"""Kill a run at random moments, damage its checkpoints, and check that nothing is lost, repeated or silently wrong.

python experiments/kill/kill_rounds.py --rounds 30
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from damage import damage_rounds

from mor_jax import presets
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Config
from mor_jax.data.pipeline import make_dataset
from mor_jax.runs.metrics import read_metrics
from mor_jax.train.loop import train

STEPS, SAVE_EVERY, PAUSE = 60, 5, 0.03
PHASES = ("training", "saving", "restoring")
TIMINGS = ("tokens_per_second", "data_wait_seconds", "goodput", "mfu")
_LONGEST = 300.0


def run_config(folder: Path, *, keep: int) -> Config:
    """The `debug` preset at its own width with shorter rows of bytes, sixty steps, a save every fifth."""
    config = presets.get("debug").config
    model = dataclasses.replace(config.model, vocab_size=257, context_length=64)
    data = dataclasses.replace(config.data, tokenizer="bytes", cache=str(folder.parent / "data"))
    changes = {"steps": STEPS, "log_every": 1, "eval_every": 30, "eval_rows": 8, "save_every": SAVE_EVERY, "keep": keep}
    settings = dataclasses.replace(config.train, runs=str(folder), name="run", trackers=(), **changes)
    return dataclasses.replace(config, model=model, data=data, train=settings)


class RecordedBatches:
    """A data set that notes "step checksum" of every batch that it gives."""

    pause = PAUSE
    """Seconds after every batch: time to be killed in."""

    def __init__(self, dataset: Any, record: Path) -> None:
        self._dataset, self._record = dataset, record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._dataset.step

    @step.setter
    def step(self, step: int) -> None:
        self._dataset.step = step

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        step, batch = self._dataset.step, next(self._dataset)
        with self._record.open("a") as file:
            file.writelines(f"{step} {note}\n" for note in self._notes(batch))
        time.sleep(self.pause)
        return batch

    def _notes(self, batch: Mapping[str, Any]) -> list[str]:
        return [checksum_of(batch[name] for name in sorted(batch))]


def checksum_of(arrays: Iterable[Any]) -> str:
    """Return the checksum of some arrays' bytes."""
    return str(zlib.crc32(b"".join(array.tobytes() for array in arrays)))


def work(folder: Path, keep: int) -> None:
    """Be the process that is killed."""
    logger = logging.getLogger("mor_jax")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)

    def make(*arguments: Any, **keywords: Any) -> Any:
        dataset = make_dataset(*arguments, **keywords)
        return RecordedBatches(dataset, folder / "batches.txt") if keywords["split"] == "train" else dataset

    enable_compilation_cache()
    train(run_config(folder, keep=keep), make_dataset=make)


def start(folder: Path, keep: int) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the run, or continue it; return the process and the file with what it prints."""
    folder.mkdir(exist_ok=True)
    output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["MOR_CACHE"] = str(folder.parent / "cache")
    command = [sys.executable, __file__, "--worker", str(folder), "--keep", str(keep)]
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT), output


def finish(folder: Path, keep: int) -> None:
    """Run until the last step."""
    process, output = start(folder, keep)
    if process.wait(_LONGEST):
        raise SystemExit(output.read_text())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl without the timings."""
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def batches_of(folder: Path) -> set[tuple[int, int]]:
    """(step, checksum) of all batches that were given, read ahead or not; a line cut off by a kill is left out."""
    path = folder / "batches.txt"
    text = path.read_text() if path.exists() else ""
    return {(int(line.split()[0]), int(line.split()[1])) for line in text.split("\n")[:-1]}


def checkpoints_of(folder: Path) -> dict[int, Any]:
    """Fingerprints of every complete checkpoint by step."""
    paths = (folder / "run" / "checkpoints").glob("*/about/metadata")
    return {int(p.parts[-3]): json.loads(p.read_text())["leaves"] for p in paths if p.parts[-3].isdecimal()}


def compare(killed: Path, straight: Path) -> list[str]:
    """Say what a killed run has that the straight one has not: [] when all that is there agrees."""
    wrong = []
    lines, wanted = lines_of(killed), lines_of(straight)
    if lines != wanted[: len(lines)]:
        wrong.append("metrics differ")
    if not batches_of(killed) <= batches_of(straight):
        wrong.append("batches differ")
    saved, good = checkpoints_of(killed), checkpoints_of(straight)
    wrong += [f"checkpoint {step} differs" for step in saved if saved[step] != good.get(step)]
    if saved and len(lines) < max(saved):
        wrong.append(f"metrics of steps before checkpoint {max(saved)} are lost")
    return wrong


def kill_round(folder: Path, phase: str, keep: int, generator: random.Random) -> dict[str, Any]:
    """Start the run, kill it in a phase, and describe what was left."""
    before = max(checkpoints_of(folder), default=0)
    process, output = start(folder, keep)
    seen, wanted = len(lines_of(folder)), generator.randint(1, 8)
    deadline = time.monotonic() + _LONGEST
    while process.poll() is None and time.monotonic() < deadline:
        text = output.read_text()
        if phase == "training" and len(lines_of(folder)) >= min(seen, before) + wanted and "step " in text:
            break
        if phase != "training" and f"{phase} checkpoint" in text:
            break
        time.sleep(0.005)
    delay = generator.uniform(0.0, 0.25)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = output.read_text()
    resumed = f"continued from step {before}" in text if before else "continued" not in text
    half = [path.name for path in (folder / "run" / "checkpoints").glob("*") if not path.name.isdecimal()]
    return {
        "phase": phase,
        "delay_seconds": round(delay, 3),
        "killed": process.returncode == -signal.SIGKILL,
        "newest_checkpoint_before": before,
        "continued_from_it": resumed if "step " in text else None,
        "newest_checkpoint_after": max(checkpoints_of(folder), default=0),
        "metric_lines_after": len(lines_of(folder)),
        "half_written_checkpoints": half,
    }


def kill_rounds(base: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Kill runs until all rounds are done; whenever a run is at its end, compare it whole and begin another."""
    generator = random.Random(seed)
    straight = base / "straight"
    finish(straight, keep=STEPS)
    results, runs = [], 0
    folder = base / "killed-0"
    while len(results) < rounds:
        phase = PHASES[len(results) % len(PHASES)]
        if phase == "restoring" and not checkpoints_of(folder):
            phase = "training"
        result = kill_round(folder, phase, 3, generator)
        if result["killed"]:
            results.append({"round": len(results) + 1, "run": runs, **result, "wrong": compare(folder, straight)})
            print(json.dumps(results[-1]), flush=True)
        if not result["killed"] or max(checkpoints_of(folder), default=0) >= STEPS:
            runs += _close_run(folder, straight)
            folder = base / f"killed-{runs}"
    runs += _close_run(folder, straight)
    return {"rounds": results, "runs_finished_and_equal": runs}


def _close_run(folder: Path, straight: Path) -> int:
    finish(folder, keep=3)
    same = lines_of(folder) == lines_of(straight) and batches_of(folder) == batches_of(straight)
    same = same and checkpoints_of(folder)[STEPS] == checkpoints_of(straight)[STEPS]
    if not same:
        raise SystemExit(f"{folder} differs from the uninterrupted run: {compare(folder, straight)}")
    return 1


def main() -> int:
    """Run the rounds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill.json", help="JSON file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, default=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.keep)
        return 0
    begin = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        kills = kill_rounds(base, arguments.rounds, arguments.seed)
        damages = damage_rounds(base / "straight", run_config(base / "straight", keep=STEPS), arguments.seed)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    wrong = [entry for entry in kills["rounds"] if entry["wrong"] or entry["continued_from_it"] is False]
    silent = [entry for entry in damages if entry["outcome"] == "silent"]
    result = {
        "command": f"python experiments/kill/kill_rounds.py --rounds {arguments.rounds} --seed {arguments.seed}",
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")},
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - begin),
        "kills": len(kills["rounds"]),
        "kills_with_something_wrong": len(wrong),
        "kills_that_left_a_half_written_checkpoint": sum(bool(r["half_written_checkpoints"]) for r in kills["rounds"]),
        "damages": len(damages),
        "damages_detected": sum(entry["outcome"] == "detected" for entry in damages),
        "damages_harmless": sum(entry["outcome"] == "equal" for entry in damages),
        "damages_silent": len(silent),
        **kills,
        "damage": damages,
    }
    arguments.out.parent.mkdir(exist_ok=True, parents=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({name: value for name, value in result.items() if isinstance(value, int)})
    return 1 if wrong or silent else 0


if __name__ == "__main__":
    sys.exit(main())

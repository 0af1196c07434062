"""Kill one process of eight in a step and in a save, go on with four, and compare with the run that was not killed.

python experiments/kill/kill_one.py --folder KEPT       # the same command goes on where it was stopped
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kill_rounds import RecordedBatches, checkpoints_of, checksum_of, lines_of, run_config

from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Config, DistributedConfig, MeshConfig
from mor_jax.data.pipeline import make_dataset
from mor_jax.mesh.processes import initialize
from mor_jax.train.loop import train

STEPS, SAVE_EVERY = 18, 6
PHASES = {"training": (5, 8), "saving": (3, 12)}
"""In which phase which process is killed, and after how many steps at the earliest."""
AGREE = 1e-5
"""Relative difference of losses that other sums on another number of devices may make."""
_LONGEST, _OTHERS_SECONDS = 280.0, 150.0


def config_of(folder: Path) -> Config:
    """The run of kill_rounds.py, shorter, under `data` x `fsdp` 2 on however many devices there are."""
    config = run_config(folder, keep=STEPS)
    settings = dataclasses.replace(config.train, steps=STEPS, save_every=SAVE_EVERY, eval_every=0, pictures=False)
    return dataclasses.replace(config, train=settings, mesh=MeshConfig(fsdp=2))


class RecordedRows(RecordedBatches):
    """A data set that notes "step row checksum" of every row that it gives to this process."""

    pause = 0.1

    def __init__(self, dataset: Any, rows: Sequence[int], record: Path) -> None:
        super().__init__(dataset, record)
        self._rows = rows

    def _notes(self, batch: Mapping[str, Any]) -> list[str]:
        names = sorted(batch)
        return [f"{row} {checksum_of(batch[name][n] for name in names)}" for n, row in enumerate(self._rows)]


def work(folder: Path, index: int) -> None:
    """Be one process of the run; the environment says which."""

    def make(*arguments: Any, **keywords: Any) -> Any:
        dataset = make_dataset(*arguments, **keywords)
        if keywords["split"] != "train":
            return dataset
        return RecordedRows(dataset, keywords["rows"], folder / f"rows-{index}.txt")

    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("mor_jax").setLevel(logging.INFO)
    initialize(DistributedConfig())
    enable_compilation_cache()
    train(config_of(folder), make_dataset=make)


class Processes:
    """A start of the run in several processes of one fake CPU device each."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as server:
            server.bind(("localhost", 0))
            address = f"localhost:{server.getsockname()[1]}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOR_CACHE": str(folder.parent / "cache")}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        start = len(list(folder.glob("output-*-0.txt")))
        self.outputs = [folder / f"output-{start}-{index}.txt" for index in range(count)]
        self.children: list[subprocess.Popen[bytes]] = []
        for index, path in enumerate(self.outputs):
            command = [sys.executable, __file__, "--folder", str(folder), "--worker", str(index)]
            with path.open("wb") as output:
                self.children.append(
                    subprocess.Popen(
                        command,
                        env=environment | {"JAX_PROCESS_ID": str(index)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, index: int) -> str:
        """What a process printed."""
        return self.outputs[index].read_text(errors="replace")

    def end(self, seconds: float) -> list[int | None]:
        """Exit codes; None for a process that had not ended in time and was killed as a launcher would kill it."""
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
                time.sleep(0.05)
            return [child.poll() for child in self.children]
        finally:
            for child in self.children:
                child.kill()
                child.wait()

    def finish(self) -> None:
        """Wait for the last step."""
        codes = self.end(_LONGEST)
        if any(code != 0 for code in codes):
            raise SystemExit(f"{codes}\n{self.said(0)[-3000:]}")


def rows_of(folder: Path) -> set[str]:
    """Lines "step row checksum" of all processes and starts; one that a kill cut off is left out."""
    return {line for path in folder.glob("rows-*.txt") for line in path.read_text().split("\n")[:-1]}


def kill(folder: Path, phase: str) -> dict[str, Any]:
    """Start eight processes, kill one of them in a phase, and say how the others ended and what is left."""
    victim, after = PHASES[phase]
    eight = Processes(folder, 8)
    deadline = time.monotonic() + _LONGEST
    try:
        while time.monotonic() < deadline and all(child.poll() is None for child in eight.children):
            begun = len(lines_of(folder)) >= after - 1
            if begun and (phase == "training" or f"saving checkpoint {after}" in eight.said(victim)):
                break
            time.sleep(0.005)
        steps = len(lines_of(folder))
        eight.children[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        codes = eight.end(_OTHERS_SECONDS)
    finally:
        eight.end(0.0)
    return {
        "phase": phase,
        "killed_process": victim,
        "steps_done": steps,
        "killed": codes[victim] == -signal.SIGKILL,
        "seconds_until_all_had_ended": None if None in codes else round(time.monotonic() - killed, 1),
        "exit_codes": codes,
        "half_written_checkpoints": [
            path.name for path in (folder / "run" / "checkpoints").glob("*") if not path.name.isdecimal()
        ],
        "checkpoints": sorted(checkpoints_of(folder)),
    }


def go_on(folder: Path, straight: Path, killed: Mapping[str, Any]) -> dict[str, Any]:
    """Let four processes finish what one of eight was killed in, and compare with the run of eight that was not."""
    Processes(folder, 4).finish()
    newest = max(killed["checkpoints"], default=0)
    resumed = f"continued from step {newest}" in (folder / "output-1-0.txt").read_text()
    lines, wanted = lines_of(folder), lines_of(straight)
    losses = [(line["loss"], other["loss"]) for line, other in zip(lines, wanted, strict=True)]
    saved, good = checkpoints_of(folder), checkpoints_of(straight)
    result = {
        **killed,
        "continued_from": newest if resumed else None,
        "checkpoints_of_eight_equal": all(saved[step] == good[step] for step in killed["checkpoints"]),
        "lines_before_equal": lines[:newest] == wanted[:newest],
        "rows_equal": rows_of(folder) == rows_of(straight),
        "largest_relative_difference_of_losses": max(abs(loss - other) / other for loss, other in losses),
        "last_losses": {"killed": losses[-1][0], "straight": losses[-1][1]},
    }
    names = ("killed", "checkpoints_of_eight_equal", "lines_before_equal", "rows_equal")
    right = all(result[name] for name in names) and resumed
    return {**result, "right": right and result["largest_relative_difference_of_losses"] < AGREE}


def main() -> int:
    """Run what is missing in the folder and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; what is finished there stays")
    out = Path(__file__).parent / "results" / "kill_one.json"
    parser.add_argument("--out", type=Path, default=out, help="JSON file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.folder, arguments.worker)
        return 0
    straight = arguments.folder / "straight"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    if STEPS not in checkpoints_of(straight):
        shutil.rmtree(straight, ignore_errors=True)
        Processes(straight, 8).finish()
    rounds = []
    for phase in PHASES:
        folder = arguments.folder / phase
        killed, done = folder / "killed.json", folder / "done.json"
        if not killed.exists():
            shutil.rmtree(folder, ignore_errors=True)
            killed.write_text(json.dumps(kill(folder, phase)), encoding="utf-8")
            print(killed.read_text(encoding="utf-8"), flush=True)
        if not done.exists():
            found = json.loads(killed.read_text(encoding="utf-8"))
            done.write_text(json.dumps(go_on(folder, straight, found)), encoding="utf-8")
        rounds.append(json.loads(done.read_text(encoding="utf-8")))
    values = {
        "command": "python experiments/kill/kill_one.py --folder KEPT",
        "device": f"8, then 4 processes of one fake CPU device, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")},
        "python": platform.python_version(),
        "steps": STEPS,
        "rounds": rounds,
    }
    arguments.out.parent.mkdir(exist_ok=True, parents=True)
    arguments.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rounds, indent=1))
    return 0 if all(result["right"] for result in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())

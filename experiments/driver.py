"""Runs named runs within a time on one machine's devices, the most important first, for scripts of experiments/.

A script starts itself again as workers, some for every device; they share the runs (`mor_jax.sweep.execute`), so that
the compilations of some overlap with the training of others. The same command goes on where it was stopped; on another
machine with the results of the first (`take_over`). Results are written after every run.
"""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Config, PerfConfig
from mor_jax.errors import UserError
from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.execute import Measure, SweepOptions, run_sweep
from mor_jax.sweep.results import RESULT, failed_result, read_result, write_json
from mor_jax.sweep.runs import SweepRun
from mor_jax.train.loop import DivergedError, train

_log = logging.getLogger("mor_jax.driver")
Result = Mapping[str, Any]
Stage = Callable[[Mapping[str, Result]], list[SweepRun]]
"""Gives the runs of a stage, from the results of the stages before it by name."""
PLAIN_KERNELS = PerfConfig(fusion="xla", attention_backend="xla", scan_unroll=1)
"""How a run is executed that failed with this project's kernels."""
STOP_SECONDS = 15.0
"""Kept at the end of the time, for stopping and writing."""
_GRACE_SECONDS, _POLL_SECONDS, _APART_SECONDS = 6.0, 3.0, 4.0
_MEMORY_SHARE = 0.88


@dataclass(frozen=True)
class DriverOptions:
    """Options that all scripts have."""

    seconds: float = 540.0
    """From the start to the end."""
    out: Path = Path("runs/ranked")
    """Folder of the run folders and logs."""
    results: Path = Path("runs/ranked/ranked.json")
    """File of the results, written after every run."""
    devices: int = 1
    """GPUs of this machine that are used."""
    processes: int = 2
    """Processes that share a device."""
    worker: int | None = None
    """Set by the script for its own processes."""


def conduct(
    options: DriverOptions, command: Sequence[str], collect: Callable[[], tuple[int, int]], started: float
) -> int:
    """Start the workers, collect results as they come, and stop everything in time.

    Args:
        options: time, folder, devices, processes.
        command: starts a worker, less its ``--worker N``.
        collect: writes the results that there are; returns how many runs are finished, and of how many.
        started: ``time.monotonic()`` at the start.

    Returns:
        The exit code: 0 if any run is finished.
    """
    workers = [_start_worker(options, command, index) for index in range(options.devices * options.processes)]
    try:
        while any(worker.poll() is None for worker in workers):
            done, known = collect()
            if known >= len(workers) and not done:
                print(f"the first {known} runs failed, so the others would: {options.out}/worker-*.log", flush=True)
                break
            if time.monotonic() - started > options.seconds - STOP_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(workers)
    done, known = collect()
    print(f"{done} of {known} runs done in {time.monotonic() - started:.0f} s: {options.results}", flush=True)
    return 0 if done else 1


def _start_worker(options: DriverOptions, command: Sequence[str], index: int) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{_MEMORY_SHARE / options.processes:.2f}")
    if options.devices > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(options.devices)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[index % options.devices]
    with (options.out / f"worker-{index}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command, "--worker", str(index)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _stop(workers: "Sequence[subprocess.Popen[bytes]]") -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    end = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:  # it compiles, or writes a checkpoint
            worker.kill()
            worker.wait()


def work(options: DriverOptions, stages: Sequence[Stage], measure: Measure | None, last_start: float) -> None:
    """Run in one process what no other one runs, stage by stage, until it is too late to start another.

    A stage begins when the one before it is finished by all, so a process may wait for the length of a run.

    Args:
        options: folder and number of this worker.
        stages: give the runs; one that gives none is passed over.
        measure: further measurements of a finished run.
        last_start: ``time.time()`` after which no run is started.
    """
    enable_compilation_cache()
    time.sleep(_APART_SECONDS * ((options.worker or 0) // options.devices))  # first compilations do not meet
    for stage in stages:
        runs = stage(results_in(options.out))
        if runs and last_start > time.time():
            sweep = SweepOptions(options.out, limit_seconds=last_start - time.time())
            run_sweep(runs, sweep, train=_train_or_fall_back, measure=_survives(measure))


def results_in(out: Path) -> dict[str, Result]:
    """Return the results of the runs that are finished, by name."""
    found = {path.parent.name: read_result(path.parent) for path in sorted(out.glob(f"*/{RESULT}"))}
    return {name: result for name, result in found.items() if result is not None}


def take_over(out: Path, rows: Sequence[Result], name: Callable[[Result], str] = lambda row: row["name"]) -> None:
    """Put finished runs of another machine where this one would have left them."""
    for row in rows:
        if row["state"] == "done":
            write_json(out / name(row) / RESULT, row)


_reported: set[str] = set()


def write_new(options: DriverOptions, finished: Mapping[str, Result], values: Callable[[], Any]) -> None:
    """Write the results if runs finished since the last call, and print these."""
    new = [name for name in finished if name not in _reported]
    if new or not options.results.exists():
        write_json(options.results, values())
    for name in new:
        losses = ", ".join(f"{key} {finished[name].get(key)}" for key in ("nll", "topk_nll", "seconds"))
        print(f"{name}: {finished[name]['state']}, {losses}", flush=True)
    _reported.update(new)


def row_of(out: Path, run: SweepRun, command: str) -> dict[str, Any]:
    """Return the result of a run, or how far it came; its command becomes this script's."""
    result = read_result(out / run.name)
    if result is None:
        begun = read_metrics(out / run.name / "metrics.jsonl")
        state, why = ("unfinished", f"at step {begun[-1]['step']}") if begun else ("not run", "")
        return failed_result(run, state, why)
    if "machine" in result and result["machine"]["command"].startswith("mor "):
        result["machine"]["command"] = command
        write_json(out / run.name / RESULT, result)  # a later start has other options
    return result


def _train_or_fall_back(config: Config, **arguments: Any) -> Path:
    """Train; a kernel that fails is replaced by XLA's, once, and a run that fails again is reported as failed."""
    try:
        return train(config, **arguments)
    except (UserError, DivergedError):
        raise
    except Exception:
        _log.exception("%s failed: again with %s", config.train.name, PLAIN_KERNELS)
    try:
        return train(dataclasses.replace(config, perf=PLAIN_KERNELS), **arguments)
    except (UserError, DivergedError):
        raise
    except Exception as error:
        _log.exception("%s failed again", config.train.name)
        raise DivergedError(f"failed twice: {error}") from error


def _survives(measure: Measure | None) -> Measure | None:
    """A measurement that fails is reported; the run stays finished."""
    if measure is None:
        return None

    def measured(folder: Path) -> dict[str, Any]:
        try:
            return measure(folder)
        except Exception as error:
            _log.exception("the measurements of %s failed", folder.name)
            return {"measurements_failed": str(error)}

    return measured

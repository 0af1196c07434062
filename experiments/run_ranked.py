"""Run the ranked runs within a time, the most important first, and write the results after every run.

    python experiments/run_ranked.py --scale long --seconds 540 --text val.jsonl.xz --results ranked.json
    python experiments/run_ranked.py --spread ranked.json

The first command measures the device's speed, sets the number of steps so that about --aim runs finish in time, and
shares the runs between processes, whose compilations then overlap with the training of others. The same command goes on
where it was stopped; on another machine, with ``--earlier ranked.json``. The second writes experiments/*/results.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from ranked import RankedRun, ranked_runs, spread

from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Config, PerfConfig
from mor_jax.errors import UserError, require
from mor_jax.model.flops import train_flops_per_token
from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.execute import SweepOptions, placed, run_sweep
from mor_jax.sweep.isoflop import with_scaled_steps
from mor_jax.sweep.measurement import Measure, measurer
from mor_jax.sweep.results import RESULT, failed_result, read_result, write_json
from mor_jax.train.loop import DivergedError, train

_log = logging.getLogger("mor_jax.ranked")
PLAIN_KERNELS = PerfConfig(fusion="xla", attention_backend="xla", scan_unroll=1)
"""How a run is executed that failed with this project's kernels."""
_START_SECONDS, _STOP_SECONDS, _GRACE_SECONDS, _POLL_SECONDS = 35.0, 15.0, 6.0, 3.0
_USED = 0.85
"""Share of the time left after starting that training itself is expected to get."""
_LONGEST_FACTOR = 1.45
"""Most steps over the scale's: above it, MoR would see some text more than four times."""


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    scale: str = "debug"
    """As of `mor sweep`."""
    seconds: float = 540.0
    """From the start to the end."""
    out: Path = Path("runs/ranked")
    """Folder of the run folders and logs."""
    results: Path = Path("runs/ranked/ranked.json")
    """File of the results, written after every run."""
    text: Path | None = None
    """Held-out text on which every run is measured by source."""
    processes: int = 2
    """Processes that share the runs and the device."""
    aim: int = 16
    """Runs that should finish in time."""
    steps_factor: float | None = None
    """Steps over the scale's; None measures the device and fits --aim runs into the time."""
    earlier: Path | None = None
    """Results of another machine: what is done there is taken over, and the rest gets as many steps."""
    spread: Path | None = None
    """Only put the results of this file into the experiments' folders."""
    worker: int | None = None
    """Set by the script for its own processes."""


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    if options.spread is not None:
        values = json.loads(options.spread.read_text(encoding="utf-8"))
        for path in spread(values["results"], values["scale"], values["steps_factor"]):
            print(path)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    if options.worker is None:
        return conduct(options)
    enable_compilation_cache()
    work(options)
    return 0


def conduct(options: Arguments) -> int:
    """Start the processes, write the results as they come, and stop everything in time."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        _take_over(options, options.earlier)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.88 / options.processes:.2f}")
    plan = _plan(options)
    left = options.seconds - (time.monotonic() - started)
    run_seconds = left * _USED / options.aim
    last_start = max(1.0, left - _STOP_SECONDS - 0.8 * options.processes * run_seconds)
    print(
        f"plan {plan}; {left:.0f} s left, about {run_seconds:.0f} s a run, last start in {last_start:.0f} s", flush=True
    )
    plan["last_start"] = time.time() + last_start
    write_json(_plan_path(options), plan)
    runs = _runs(options, plan)
    workers = [_start_worker(options, index) for index in range(options.processes)]
    try:
        while any(worker.poll() is None for worker in workers):
            _collect(options, plan, runs)
            if time.monotonic() - started > options.seconds - _STOP_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(workers)
    done = _collect(options, plan, runs)
    print(f"{done} of {len(runs)} runs done in {time.monotonic() - started:.0f} s: {options.results}", flush=True)
    return 0 if done else 1


def _take_over(options: Arguments, earlier: Path) -> None:
    """Put the plan and the finished runs of another machine where this one would have left them."""
    values = json.loads(earlier.read_text(encoding="utf-8"))
    require(values["scale"] == options.scale, f"{earlier} is of scale {values['scale']!r}, not {options.scale!r}")
    for row in values.pop("results"):
        if row["state"] == "done":
            write_json(options.out / f"{row['experiment']}.{row['name']}" / RESULT, row)
    if not _plan_path(options).exists():
        write_json(_plan_path(options), values)


def _plan(options: Arguments) -> dict[str, Any]:
    """Return steps factor, execution and measured speed: of an earlier start in this folder, given, or measured."""
    path = _plan_path(options)
    if path.exists() and not (earlier := json.loads(path.read_text(encoding="utf-8"))).get("calibrating"):
        return earlier
    if options.steps_factor is not None:
        return {"steps_factor": options.steps_factor, "plain_kernels": False}
    started = time.monotonic()
    for plain in (False, True):
        write_json(path, {"steps_factor": 1.0, "plain_kernels": plain, "calibrating": True})
        process = subprocess.run(_command(options, worker=-1), check=False)
        if process.returncode == 0:
            break
        print("calibration failed" + ("" if plain else ": trying again with XLA's kernels"), flush=True)
    speed = json.loads((options.out / "speed.json").read_text(encoding="utf-8"))
    left = options.seconds - (time.monotonic() - started) - _START_SECONDS
    baseline = ranked_runs(options.scale)[0].run.config
    tokens = baseline.train.steps * baseline.train.batch_size * baseline.model.context_length
    budget = speed["train_flops_per_second"] * left * _USED / options.aim
    factor = min(_LONGEST_FACTOR, budget / (train_flops_per_token(baseline.model) * tokens))
    return {"steps_factor": math.floor(100 * factor) / 100, "plain_kernels": plain, **speed}


def _calibrate(options: Arguments, run: RankedRun) -> None:
    """Train a few steps of a routed model, which takes all kernels, and note the speed of the last of them."""
    steps = min(400, run.run.config.train.steps)
    config = placed(run.placed, options.out / "calibration").config
    config = with_scaled_steps(config, steps / config.train.steps)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=max(1, steps // 2)))
    train(config)
    last = read_metrics(Path(config.train.runs) / config.train.name / "metrics.jsonl")[-1]
    require(last["loss"] < 2 * math.log(config.model.vocab_size), f"the loss of the calibration is {last['loss']}")
    rate = last["tokens_per_second"]
    flops = rate * train_flops_per_token(config.model)
    write_json(options.out / "speed.json", {"tokens_per_second": rate, "train_flops_per_second": flops})


def work(options: Arguments) -> None:
    """Run in one process what no other one runs, until it is too late to start another."""
    plan = json.loads(_plan_path(options).read_text(encoding="utf-8"))
    if options.worker == -1:
        routed = next(run for run in _runs(options, plan) if "expert" in run.run.name)
        _calibrate(options, routed)
        return
    time.sleep(4.0 * (options.worker or 0))  # the first compilations do not meet
    runs = [run.placed for run in _runs(options, plan)]
    sweep = SweepOptions(options.out, limit_seconds=max(0.0, plan["last_start"] - time.time()))
    run_sweep(runs, sweep, train=_train_or_fall_back, measure=_measure(options))


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


def _measure(options: Arguments) -> Measure:
    """Return what to measure of a finished run: by source always; by depth and calibrated first seeds and `large`."""
    texts = () if options.text is None else (options.text,)
    by_source = measurer(texts, depth_curve=False)
    in_full = measurer(texts, depth_curve=True, calibration_rows=256)

    def measure(folder: Path) -> dict[str, Any]:
        first = folder.name.startswith(("mor_vs_baselines", "test_time_scaling")) and (
            folder.name.endswith("-s0") or options.scale == "large"
        )
        chosen = in_full if first or folder.name.startswith("closing_the_gap") else by_source
        try:
            return chosen(folder) if chosen else {}
        except Exception as error:
            _log.exception("the measurements of %s failed", folder.name)
            return {"measurements_failed": str(error)}

    return measure


def _runs(options: Arguments, plan: dict[str, Any]) -> list[RankedRun]:
    perf = PLAIN_KERNELS if plan["plain_kernels"] else None
    return ranked_runs(options.scale, plan["steps_factor"], perf)


def _plan_path(options: Arguments) -> Path:
    return options.out / "plan.json"


def _command(options: Arguments, worker: int) -> list[str]:
    text = [] if options.text is None else ["--text", str(options.text)]
    shared = ["--scale", options.scale, "--out", str(options.out), *text]
    return [sys.executable, __file__, *shared, "--worker", str(worker)]


def _start_worker(options: Arguments, index: int) -> "subprocess.Popen[bytes]":
    log = (options.out / f"worker-{index}.log").open("ab")
    return subprocess.Popen(_command(options, index), stdout=log, stderr=subprocess.STDOUT)


def _stop(workers: "list[subprocess.Popen[bytes]]") -> None:
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


_reported: set[str] = set()


def _collect(options: Arguments, plan: dict[str, Any], runs: list[RankedRun]) -> int:
    """Write the results of all runs if there are new ones; return how many are finished."""
    found = {run.placed.name: read_result(options.out / run.placed.name) for run in runs}
    finished = {name: result for name, result in found.items() if result is not None}
    if finished.keys() - _reported or not options.results.exists():
        rows = [_row(options, each, found[each.placed.name]) for each in runs]
        write_json(options.results, {"scale": options.scale, **plan, "results": rows})
    for name in finished.keys() - _reported:
        losses = ", ".join(f"{key} {finished[name].get(key)}" for key in ("nll", "topk_nll", "seconds"))
        print(f"{name}: {finished[name]['state']}, {losses}", flush=True)
    _reported.update(finished)
    return sum(result["state"] == "done" for result in finished.values())


def _row(options: Arguments, each: RankedRun, result: dict[str, Any] | None) -> dict[str, Any]:
    """The result of a run under its experiment's names, or how far it came."""
    if result is None:
        begun = read_metrics(options.out / each.placed.name / "metrics.jsonl")
        state, why = ("unfinished", f"at step {begun[-1]['step']}") if begun else ("not run", "")
        return _missing(each, state, why) | {"experiment": each.experiment}
    if "machine" in result and "run_ranked" not in result["machine"]["command"]:
        result["machine"]["command"] = _described(options)
        write_json(options.out / each.placed.name / RESULT, result)  # a later start has other options
    return result | {"name": each.run.name, "group": each.run.group or each.run.name, "experiment": each.experiment}


def _described(options: Arguments) -> str:
    """The command without the folders of this machine."""
    text = [] if options.text is None else ["--text", options.text.name]
    numbers = ["--seconds", f"{options.seconds:g}", "--processes", str(options.processes), "--aim", str(options.aim)]
    return " ".join(["python experiments/run_ranked.py --scale", options.scale, *numbers, *text])


@functools.cache
def _missing(each: RankedRun, state: str, why: str) -> dict[str, Any]:
    return failed_result(each.run, state, why)


if __name__ == "__main__":
    sys.exit(main())

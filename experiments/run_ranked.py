"""Run the ranked runs within a time, the most important first, and write the results after every run.

    python experiments/run_ranked.py --scale long --seconds 540 --text val.jsonl.xz --results ranked.json
    python experiments/run_ranked.py --spread ranked.json

The first command measures the device's speed, sets the number of steps so that about --aim runs finish in time, and
shares the runs between processes (`driver.py`). The same command goes on where it was stopped; on another machine, with
``--earlier ranked.json``. The second writes experiments/*/results.
"""

import dataclasses
import functools
import json
import logging
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from driver import PLAIN_KERNELS, STOP_SECONDS, DriverOptions, conduct, results_in, row_of, take_over, work, write_new
from ranked import RankedRun, ranked_runs, spread

from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import require
from mor_jax.model.flops import train_flops_per_token
from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.execute import Measure, placed
from mor_jax.sweep.isoflop import with_scaled_steps
from mor_jax.sweep.measurement import measurer
from mor_jax.sweep.results import write_json
from mor_jax.train.loop import train

_START_SECONDS = 35.0
_USED = 0.85
"""Share of the time left after starting that training itself is expected to get."""
_LONGEST_FACTOR = 1.45
"""Most steps over the scale's: above it, MoR would see some text more than four times."""


@dataclass(frozen=True)
class Arguments(DriverOptions):
    """Options of the script."""

    scale: str = "debug"
    """As of `mor sweep`."""
    text: Path | None = None
    """Held-out text on which every run is measured by source."""
    aim: int = 16
    """Runs that should finish in time."""
    steps_factor: float | None = None
    """Steps over the scale's; None measures the device and fits --aim runs into the time."""
    earlier: Path | None = None
    """Results of another machine: what is done there is taken over, and the rest gets as many steps."""
    spread: Path | None = None
    """Only put the results of this file into the experiments' folders."""


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
        return _conduct(options)
    plan = json.loads(_plan_path(options).read_text(encoding="utf-8"))
    if options.worker == -1:
        enable_compilation_cache()
        _calibrate(options, next(run for run in _runs(options, plan) if "expert" in run.run.name))
        return 0
    runs = [run.placed for run in _runs(options, plan)]
    work(options, lambda _: runs, _measure(options), lambda _: plan["last_start"])
    return 0


def _conduct(options: Arguments) -> int:
    """Plan how many steps the runs have, and conduct them."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        _take_over(options, options.earlier)
    plan = _plan(options)
    left = options.seconds - (time.monotonic() - started)
    run_seconds = left * _USED / options.aim
    last_start = max(1.0, left - STOP_SECONDS - 0.8 * options.devices * options.processes * run_seconds)
    print(
        f"plan {plan}; {left:.0f} s left, about {run_seconds:.0f} s a run, last start in {last_start:.0f} s", flush=True
    )
    plan["last_start"] = time.time() + last_start
    write_json(_plan_path(options), plan)
    runs = _runs(options, plan)
    return conduct(options, _command(options), functools.partial(_collect, options, plan, runs), started)


def _take_over(options: Arguments, earlier: Path) -> None:
    """Put the plan and the finished runs of another machine where this one would have left them."""
    values = json.loads(earlier.read_text(encoding="utf-8"))
    require(values["scale"] == options.scale, f"{earlier} is of scale {values['scale']!r}, not {options.scale!r}")
    take_over(options.out, values.pop("results"), lambda row: f"{row['experiment']}.{row['name']}")
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
        process = subprocess.run([sys.executable, *_command(options), "--worker", "-1"], check=False)
        if process.returncode == 0:
            break
        print("calibration failed" + ("" if plain else ": trying again with XLA's kernels"), flush=True)
    speed = json.loads((options.out / "speed.json").read_text(encoding="utf-8"))
    left = options.seconds - (time.monotonic() - started) - _START_SECONDS
    baseline = ranked_runs(options.scale)[0].run.config
    tokens = baseline.train.steps * baseline.train.batch_size * baseline.model.context_length
    budget = speed["train_flops_per_second"] * options.devices * left * _USED / options.aim
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
        return chosen(folder) if chosen else {}

    return measure


def _runs(options: Arguments, plan: dict[str, Any]) -> list[RankedRun]:
    perf = PLAIN_KERNELS if plan["plain_kernels"] else None
    return ranked_runs(options.scale, plan["steps_factor"], perf)


def _plan_path(options: Arguments) -> Path:
    return options.out / "plan.json"


def _command(options: Arguments) -> list[str]:
    text = [] if options.text is None else ["--text", str(options.text)]
    return [__file__, "--scale", options.scale, "--out", str(options.out), "--devices", str(options.devices), *text]


def _collect(options: Arguments, plan: dict[str, Any], runs: list[RankedRun]) -> tuple[int, int]:
    """Write the results of all runs if there are new ones; return how many are finished, and of how many."""
    names = {run.placed.name for run in runs}
    finished = {name: result for name, result in results_in(options.out).items() if name in names}
    write_new(
        options, finished, lambda: {"scale": options.scale, **plan, "results": [_row(options, each) for each in runs]}
    )
    return sum(result["state"] == "done" for result in finished.values()), len(runs)


def _row(options: Arguments, each: RankedRun) -> dict[str, Any]:
    """The result of a run under its experiment's names, or how far it came."""
    names = {"name": each.run.name, "group": each.run.group or each.run.name, "experiment": each.experiment}
    return row_of(options.out, each.placed, _described(options)) | names


def _described(options: Arguments) -> str:
    """The command without the folders of this machine."""
    text = [] if options.text is None else ["--text", options.text.name]
    cards = [] if options.devices == 1 else ["--devices", str(options.devices)]
    numbers = ["--seconds", f"{options.seconds:g}", *cards, "--processes", str(options.processes)]
    aim = ["--aim", str(options.aim)]
    return " ".join(["python experiments/run_ranked.py --scale", options.scale, *numbers, *aim, *text])


if __name__ == "__main__":
    sys.exit(main())

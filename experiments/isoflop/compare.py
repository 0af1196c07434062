"""Run the comparison within a time, the most telling runs first, and write the results after every run.

    python experiments/isoflop/compare.py --seconds 560 --devices 2 --report data/isoflop-text/report.jsonl

The same command goes on where it was stopped, runs that were not finished included; on another machine, with
``--earlier RESULTS.json``. `outcome.py` writes what came out.
"""

import functools
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import tyro
from comparison import Comparison
from driver import STOP_SECONDS, conduct, results_in, row_of, work, write_new
from estimate import measured_on_val, seconds_of

from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.results import write_json
from mor_jax.sweep.runs import SweepRun

_LEAST_SECONDS = 100.0
"""Before the end after which nothing is started that another call would have to finish: it would hardly compile."""


@dataclass(frozen=True)
class Arguments(launch.LaunchOptions):
    """Options of the script."""

    out: Path = Path("runs/isoflop-comparison")
    results: Path = Path("runs/isoflop-comparison/comparison.json")
    processes: int = 3
    """Processes that share a device."""
    more_calls: bool = False
    """Another call follows on this machine: what cannot finish is started, too, and goes on then."""


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    comparison = Comparison(options.scale, options.corpus)
    if options.worker is not None:
        plan = json.loads(options.plan_path.read_text(encoding="utf-8"))
        last_start = functools.partial(_last_start, options.out, plan)
        measure = launch.measurer(options, lambda text, name: text == "report" or measured_on_val(name))
        work(options, comparison.plan, measure, last_start)
        return 0
    started = time.monotonic()
    launch.prepare(options)
    end = time.time() + options.seconds - STOP_SECONDS
    write_json(options.plan_path, {"end": end, "more_calls": options.more_calls, "processes": options.processes})
    command = launch.worker_command(options, __file__)
    return conduct(options, command, functools.partial(_collect, options, comparison), started)


def _last_start(out: Path, plan: dict[str, Any], run: SweepRun) -> float:
    """When a run must have started to end in time, from where it stands."""
    if plan["more_calls"]:
        return plan["end"] - _LEAST_SECONDS
    begun = read_metrics(out / run.name / "metrics.jsonl")
    done = begun[-1]["step"] / run.config.train.steps if begun else 0.0
    return plan["end"] - (1 - done) * seconds_of(run.config, run.name, plan["processes"])


def _collect(options: Arguments, comparison: Comparison) -> tuple[int, int]:
    """Write the results of all runs that are decided on, in their order, if there are new ones."""
    finished = results_in(options.out)

    def values() -> dict[str, Any]:
        command = launch.described(options, "compare.py")
        stages = {run.name: stage for stage, runs in reversed(comparison.stages(finished).items()) for run in runs}
        rows = [row_of(options.out, run, command) | {"stage": stages[run.name]} for run in comparison.plan(finished)]
        rows += [result for name, result in finished.items() if name not in stages]  # no choice asks for it any more
        corpus = launch.corpus_hash(options)
        return {"scale": options.scale, "budgets": comparison.budgets, "corpus": corpus, "results": rows}

    write_new(options, finished, values)
    return sum(result["state"] == "done" for result in finished.values()), len(finished)


if __name__ == "__main__":
    sys.exit(main())

"""Run every family's best at the smallest budget again: has a change of the code moved what is compared?

    python experiments/isoflop/again.py --seconds 300 --processes 4 --report data/isoflop-text/report.jsonl

The same seed, rate, text and steps, in a folder of their own. The results have the loss of before beside the new one.
"""

import functools
import json
import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import tyro
from ablation import loss_on
from choices import Results
from comparison import Comparison
from driver import conduct, results_in, row_of, work, write_new
from families import FAMILIES

from mor_jax.sweep.runs import SweepRun


@dataclass(frozen=True)
class Arguments(launch.LaunchOptions):
    """Options of the script."""

    out: Path = Path("runs/isoflop-again")
    results: Path = Path("runs/isoflop-again/again.json")
    of: Path = Path("experiments/isoflop/results/comparison.json")
    """What `compare.py` wrote before the change."""


def best_runs(comparison: Comparison, before: Results) -> list[SweepRun]:
    """Return every family's best run at the smallest budget, as far as it is known."""
    return [run for family in FAMILIES for run in comparison.at_best(before, family, budget=0)]


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    before = {row["name"]: row for row in json.loads(options.of.read_text(encoding="utf-8"))["results"]}
    runs = best_runs(Comparison(options.scale, options.corpus), before)
    if options.worker is not None:
        work(options, lambda results: runs, launch.measurer(options), lambda run: math.inf)
        return 0
    started = time.monotonic()
    launch.prepare(options)
    command = [*launch.worker_command(options, __file__), "--of", str(options.of)]
    return conduct(options, command, functools.partial(_collect, options, runs, before), started)


def _collect(options: Arguments, runs: list[SweepRun], before: Results) -> tuple[int, int]:
    """Write the results if there are new ones, each beside what it was."""
    finished = results_in(options.out)

    def values() -> dict[str, Any]:
        command = launch.described(options, "again.py")
        rows = [row_of(options.out, run, command) for run in runs]
        moved = {row["name"]: {half: _moved(row, before, half) for half in ("choose", "report")} for row in rows}
        return {"scale": options.scale, "corpus": launch.corpus_hash(options), "moved": moved, "results": rows}

    write_new(options, finished, values)
    return sum(row["state"] == "done" for row in finished.values()), len(finished)


def _moved(row: dict[str, Any], before: Results, half: str) -> dict[str, float | None]:
    return {"before": loss_on(before[row["name"]], half), "now": loss_on(row, half)}


if __name__ == "__main__":
    sys.exit(main())

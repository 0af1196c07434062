"""Run the ablation within a time, and write the results after every run.

    python experiments/isoflop/run.py --seconds 560 --devices 2 --report data/isoflop-text/report.jsonl

The same command goes on where it was stopped; on another machine, with ``--earlier RESULTS.json``. README.md beside it
has the corpus' commands, `table.py` writes the table.
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
from ablation import Ablation
from driver import STOP_SECONDS, conduct, in_stages, results_in, row_of, work, write_new
from models import scale_of

from mor_jax.sweep.results import write_json
from mor_jax.sweep.runs import SweepRun

_BESIDE_SECONDS = 15.0
"""Of a run beside its steps: compilation and measurements."""


@dataclass(frozen=True)
class Arguments(launch.LaunchOptions):
    """Options of the script."""

    out: Path = Path("runs/isoflop")
    results: Path = Path("runs/isoflop/ablation.json")
    flops_per_second: float = 1.1e14
    """Training FLOPs that a device makes in a second, all its processes together: says when a run can still finish."""


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    scale = scale_of(options.scale)
    ablation = Ablation(options.scale, options.corpus)
    if options.worker is not None:
        last_start = json.loads(options.plan_path.read_text(encoding="utf-8"))["last_start"]
        work(options, in_stages(ablation.stages()), launch.measurer(options), lambda _: last_start)
        return 0
    started = time.monotonic()
    launch.prepare(options)
    run_seconds = options.processes * scale.budget / options.flops_per_second + _BESIDE_SECONDS
    last_start = max(1.0, options.seconds - STOP_SECONDS - run_seconds)
    print(f"about {run_seconds:.0f} s a run, last start in {last_start:.0f} s", flush=True)
    write_json(options.plan_path, {"last_start": time.time() + last_start})
    command = launch.worker_command(options, __file__)
    return conduct(options, command, functools.partial(_collect, options, ablation), started)


def _collect(options: Arguments, ablation: Ablation) -> tuple[int, int]:
    """Write the results of all runs that are known by now, in their order, if there are new ones."""
    finished = results_in(options.out)

    def values() -> dict[str, Any]:
        known: dict[str, SweepRun] = {}
        for stage in ablation.stages():
            for run in stage(finished):
                known.setdefault(run.name, run)
        rows = [row_of(options.out, run, launch.described(options, "run.py")) for run in known.values()]
        rows += [result for name, result in finished.items() if name not in known]  # of choices that later ones changed
        head = {"scale": options.scale, "budget": scale_of(options.scale).budget, "corpus": launch.corpus_hash(options)}
        return {**head, "results": rows}

    write_new(options, finished, values)
    return sum(result["state"] == "done" for result in finished.values()), len(finished)


if __name__ == "__main__":
    sys.exit(main())

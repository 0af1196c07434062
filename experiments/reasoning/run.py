"""Run the comparison within a time, and write the results after every run.

    python experiments/reasoning/run.py --seconds 560

The same command goes on where it was stopped; on another machine, with ``--earlier RESULTS.json``. `tables.py` and
`figures.py` show the results.
"""

import functools
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # driver.py
import tyro
from answers import measure
from drawn import compile_drawn_step, drawn_flops
from driver import STOP_SECONDS, DriverOptions, conduct, results_in, row_of, take_over, work, write_new
from ranking import ranked_runs
from reasoners import DRAWN, Scale, scale_of
from rows import make_dataset

from mor_jax.config import Config
from mor_jax.errors import require
from mor_jax.interop.sources import open_run
from mor_jax.sweep.results import write_json
from mor_jax.train.loop import train


@dataclass(frozen=True)
class Arguments(DriverOptions):
    """Options of the script."""

    scale: str = "full"
    """`full`, `notebook` or `debug`."""
    out: Path = Path("runs/reasoning")
    results: Path = Path("runs/reasoning/reasoning.json")
    processes: int = 3
    earlier: Path | None = None
    """Results of another machine: what is done there is taken over."""
    run_seconds: float = 120.0
    """What a run may take: none is started that could not finish."""


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    scale = scale_of(options.scale)
    if options.worker is not None:
        last_start = json.loads((options.out / "plan.json").read_text(encoding="utf-8"))["last_start"]
        runs, measure_run = ranked_runs(options.scale), functools.partial(_measure, scale)
        work(options, lambda _: runs, measure_run, lambda _: last_start, train=train_on_questions)
        return 0
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        values = json.loads(options.earlier.read_text(encoding="utf-8"))
        require(values["scale"] == options.scale, f"{options.earlier} is of scale {values['scale']!r}")
        take_over(options.out, values["results"])
    last_start = max(1.0, options.seconds - STOP_SECONDS - options.run_seconds)
    write_json(options.out / "plan.json", {"last_start": time.time() + last_start})
    command = [__file__, "--scale", options.scale, "--out", str(options.out), "--devices", str(options.devices)]
    return conduct(options, command, functools.partial(_collect, options), started)


def train_on_questions(config: Config, **arguments: Any) -> Path:
    """Train a run of ``reasoners``: on its questions, and with drawn passes if it is of that family."""
    if config.preset == DRAWN:
        arguments["compile_step"] = compile_drawn_step
    return train(config, make_dataset=make_dataset, **arguments)


def _measure(scale: Scale, folder: Path) -> dict[str, Any]:
    run = open_run(folder)
    counted = {"train_flops": drawn_flops(run.config)} if run.config.preset == DRAWN else {}  # else: all passes
    return measure(run, scale.measured_rows) | counted


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Leave the configuration out of a row without figures; `reasoners.py` has it."""
    return {name: value for name, value in row.items() if name != "config"}


def _collect(options: Arguments) -> tuple[int, int]:
    """Write the results of all runs, in their order, if there are new ones; return how many are done, of the ended."""
    finished, runs = results_in(options.out), ranked_runs(options.scale)
    command = (
        f"python experiments/reasoning/run.py --scale {options.scale} --seconds {options.seconds:g} "
        f"--devices {options.devices} --processes {options.processes}"
    )

    def values() -> dict[str, Any]:
        rows = [row_of(options.out, run, command) for run in runs]
        return {"scale": options.scale, "results": [row if row["state"] == "done" else _short(row) for row in rows]}

    write_new(options, finished, values)
    return sum(result["state"] == "done" for result in finished.values()), len(finished)


if __name__ == "__main__":
    sys.exit(main())

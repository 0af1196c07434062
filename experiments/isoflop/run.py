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

sys.path.insert(0, str(Path(__file__).parent.parent))  # driver.py
import tyro
from ablation import Ablation
from driver import STOP_SECONDS, DriverOptions, conduct, results_in, row_of, take_over, work, write_new
from models import scale_of

from mor_jax.errors import require
from mor_jax.evaluate.text_loss import text_losses
from mor_jax.interop.sources import open_run
from mor_jax.sweep.results import write_json
from mor_jax.sweep.runs import SweepRun

_BESIDE_SECONDS = 15.0
"""Of a run beside its steps: compilation and measurements."""


@dataclass(frozen=True)
class Arguments(DriverOptions):
    """Options of the script."""

    scale: str = "full"
    """`full` or `debug`."""
    corpus: str = "data/isoflop"
    """Prepared corpus, whose held-out split is the half `choose`."""
    report: Path | None = None
    """The other half, on which figures are reported."""
    val: Path | None = None
    """Another held-out text, reported beside."""
    out: Path = Path("runs/isoflop")
    results: Path = Path("runs/isoflop/ablation.json")
    earlier: Path | None = None
    """Results of another machine: what is done there is taken over."""
    flops_per_second: float = 1.1e14
    """Training FLOPs that a device makes in a second, all its processes together: says when a run can still finish."""


def main() -> int:
    """Run what the arguments say."""
    options = tyro.cli(Arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    scale = scale_of(options.scale)
    ablation = Ablation(options.scale, options.corpus)
    texts = {name: path for name in ("report", "val") if (path := getattr(options, name)) is not None}
    for path in texts.values():
        require(path.is_file(), f"{path}: no such file")
    if options.worker is not None:
        measure = functools.partial(_measure, texts) if texts else None
        last_start = json.loads((options.out / "plan.json").read_text(encoding="utf-8"))["last_start"]
        work(options, ablation.stages(), measure, last_start)
        return 0
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        values = json.loads(options.earlier.read_text(encoding="utf-8"))
        require(values["scale"] == options.scale, f"{options.earlier} is of scale {values['scale']!r}")
        take_over(options.out, values["results"])
    run_seconds = options.processes * scale.budget / options.flops_per_second + _BESIDE_SECONDS
    last_start = max(1.0, options.seconds - STOP_SECONDS - run_seconds)
    print(f"about {run_seconds:.0f} s a run, last start in {last_start:.0f} s", flush=True)
    write_json(options.out / "plan.json", {"last_start": time.time() + last_start})
    command = [__file__, "--scale", options.scale, "--corpus", options.corpus, "--out", str(options.out)]
    command += ["--devices", str(options.devices)]
    for name, path in texts.items():
        command += [f"--{name}", str(path)]
    return conduct(options, command, functools.partial(_collect, options, ablation), started)


def _measure(texts: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Causal and look-ahead loss by source of texts that the run did not validate on."""
    run = open_run(folder)
    return {name: text_losses(run, [path], stride=run.config.model.context_length) for name, path in texts.items()}


def _collect(options: Arguments, ablation: Ablation) -> tuple[int, int]:
    """Write the results of all runs that are known by now, in their order, if there are new ones."""
    finished = results_in(options.out)

    def values() -> dict[str, Any]:
        known: dict[str, SweepRun] = {}
        for stage in ablation.stages():
            for run in stage(finished):
                known.setdefault(run.name, run)
        rows = [row_of(options.out, run, _described(options)) for run in known.values()]
        rows += [result for name, result in finished.items() if name not in known]  # of choices that later ones changed
        return {"scale": options.scale, "budget": scale_of(options.scale).budget, "results": rows}

    write_new(options, finished, values)
    return sum(result["state"] == "done" for result in finished.values()), len(finished)


def _described(options: Arguments) -> str:
    """The command without the folders of this machine."""
    return (
        f"python experiments/isoflop/run.py --scale {options.scale} --seconds {options.seconds:g} "
        f"--devices {options.devices} --processes {options.processes}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""``mor sweep FILE``: a list of runs, one after another, resumable, with one table at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import UserError
from mor_jax.sweep.runs import SweepRun, first_of_groups, load_sweep


@dataclass(frozen=True)
class SweepArguments:
    """Arguments of ``mor sweep``."""

    file: Annotated[Path, tyro.conf.Positional]
    """Python or JSON file with the runs."""
    out: Path | None = None
    """Folder of the run folders; the same command goes on where it stopped. None is runs/NAME, of the file's folder."""
    scale: str = ""
    """Size at which a Python file's runs are built, such as `debug` or `small`."""
    one_seed: bool = False
    """Only the first run of every group, whose runs differ in their seed."""
    share: str = "0/1"
    """I/N: this host takes every N-th run, from I on. Processes on one machine need none: they share by locks."""
    limit_seconds: float | None = None
    """Start no run after this many seconds."""
    results: Path | None = None
    """JSON file for the results of all runs; None is results.json in --out."""
    text: tuple[Path, ...] = ()
    """Texts on which every finished run is measured too (as `mor eval --text`)."""
    depth_curve: bool = False
    """Also measure every finished run with its depth capped at 1, 2, ..., N_r passes."""
    calibrate: int = 0
    """Also measure expert-choice with boundaries calibrated on this many rows of training text."""
    list: bool = False
    """Only list the runs with their cost."""


def run(arguments: Sequence[str]) -> int:
    """Run the sweep, write results.json and table.md, and print the table."""
    options = parse(SweepArguments, arguments, "sweep", "Run a list of configurations, skipping what is done.")
    runs = load_sweep(options.file, options.scale)
    runs = first_of_groups(runs) if options.one_seed else runs
    return _run(options, runs)


def _run(options: SweepArguments, runs: Sequence[SweepRun]) -> int:
    from mor_jax.sweep.execute import SweepOptions, run_sweep
    from mor_jax.sweep.measurement import measurer
    from mor_jax.sweep.results import write_json
    from mor_jax.sweep.table import group_table, markdown_table

    out = options.out or Path("runs") / options.file.resolve().parent.name
    sweep = SweepOptions(out, _share(options.share), options.limit_seconds)
    measure = measurer(options.text, depth_curve=options.depth_curve, calibration_rows=options.calibrate)
    if options.list:
        for each in runs:
            train, model = each.config.train, each.config.model
            print(f"{each.name:32s} {train.steps:6d} steps x {train.batch_size} x {model.context_length} tokens")
        return 0
    enable_compilation_cache()
    report = options.results or out / "results.json"
    report.parent.mkdir(parents=True, exist_ok=True)  # better refused before the runs than after them
    results = run_sweep(runs, sweep, measure=measure)
    write_json(report, results)
    table = markdown_table(results)
    groups = group_table(results)
    table += f"\n{groups}" if groups else ""
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 0 if all(result["state"] == "done" for result in results) else 1


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"--share {text!r} is not of the form I/N, such as 0/4")
    return int(index), int(count)

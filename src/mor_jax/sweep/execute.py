"""Runs a sweep one run after another, skips what is done, and shares the work with other processes and hosts.

Every run has a folder as ``mor train`` writes it, and a result.json in it when it is finished. A lock beside the folder
says that a process is at it, and is released when that process ends, however it ends: processes that were given the
same command on one machine share its runs. Hosts without a common file system take a fixed share each.
"""

import dataclasses
import fcntl
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.errors import UserError, require
from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.results import RESULT, failed_result, finished_result, read_result, write_json
from mor_jax.sweep.runs import SweepRun
from mor_jax.sweep.start import first_weights, prepare_branch
from mor_jax.train.loop import DivergedError
from mor_jax.train.loop import train as train_run

_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0

Train = Callable[..., Path]
"""As ``train.loop.train`` is called: with a configuration, and ``initial_weights`` by name."""
Outcome = Literal["done", "stopped", "nothing"]
Measure = Callable[[Path], dict[str, Any]]
"""Further measurements of a finished run folder, added to its result."""


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run."""

    folder: Path
    """Folder of the run folders."""
    share: tuple[int, int] = (0, 1)
    """(index, count): this host takes every count-th run, from index on."""
    limit_seconds: float | None = None
    """No run is started after this many seconds."""

    def __post_init__(self) -> None:
        index, count = self.share
        require(0 <= index < count, f"share={index}/{count}: the index must be in 0..{count - 1}")
        require(self.limit_seconds is None or not math.isnan(self.limit_seconds), "limit_seconds=nan is no time")


def run_sweep(
    runs: Sequence[SweepRun], options: SweepOptions, *, train: Train = train_run, measure: Measure | None = None
) -> list[dict[str, Any]]:
    """Run what is not done yet.

    Args:
        runs: of ``load_sweep``.
        options: folder, share, time limit.
        train: trains a configuration and returns its folder; Ctrl-C and SIGTERM make it return early.
        measure: further measurements of a finished run.

    Returns:
        One result per run of the whole sweep, in its order; ``state`` is `done`, `diverged`, `unfinished` or `not run`.

    Raises:
        UserError: a run folder holds another configuration, or a run cannot be started.
    """
    runs = [placed(run, options.folder) for run in runs]
    for run in runs:
        check_same(run, options.folder)
    options.folder.mkdir(parents=True, exist_ok=True)
    mine = _share_of(runs, options.share)
    started = time.monotonic()
    while pending := [run for run in mine if read_result(options.folder / run.name) is None]:
        if options.limit_seconds is not None and time.monotonic() - started > options.limit_seconds:
            _log.info("the limit of %.0f seconds is reached: %d runs left", options.limit_seconds, len(pending))
            break
        outcome = run_first(pending, options.folder, train, measure)
        if outcome == "stopped":
            break
        if outcome == "nothing":  # all that is left is another process's, or waits for it
            if not any(is_claimed(options.folder, run) for run in runs):
                break
            time.sleep(_POLL_SECONDS)
    return [_result_of(run, options.folder) for run in runs]


def placed(run: SweepRun, folder: Path) -> SweepRun:
    """Return a run whose folder is ``folder / run.name``."""
    train = dataclasses.replace(run.config.train, runs=str(folder), name=run.name)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))


def _share_of(runs: Sequence[SweepRun], share: tuple[int, int]) -> list[SweepRun]:
    """Deal out the runs; one that starts from another goes with it."""
    index, count = share
    owner: dict[str, int] = {}
    for position, run in enumerate(runs):
        owner[run.name] = owner[run.start.run] if run.start else position % count
    return [run for run in runs if owner[run.name] == index]


def check_same(run: SweepRun, folder: Path) -> None:
    """Refuse a run whose result in ``folder`` is of another configuration.

    Raises:
        UserError: it is.
    """
    result = read_result(folder / run.name)
    if result is None:
        return
    lines = config_io.differences(config_io.from_dict(Config, result["config"]), run.config)
    lines = [line for line in lines if not line.startswith(("train.runs:", "perf.", "mesh."))]
    where = folder / run.name / RESULT
    require(not lines, f"{where} is of another configuration: {'; '.join(lines)} (choose another --out)")


def run_first(runs: Sequence[SweepRun], folder: Path, train: Train, measure: Measure | None) -> Outcome:
    """Execute the first run that can be.

    Args:
        runs: placed in ``folder``.
        folder: of the run folders.
        train: see ``run_sweep``.
        measure: see ``run_sweep``.

    Returns:
        `done`, `stopped` by a signal, or `nothing`: what is not finished is at other processes, or waits for them.
    """
    for run in runs:
        if run.start is not None and not _is_done(folder, run.start.run):
            continue
        with _claim(folder, run) as owned:
            if owned and read_result(folder / run.name) is None:
                return "done" if _execute(run, folder, train, measure) else "stopped"
    return "nothing"


def _is_done(folder: Path, name: str) -> bool:
    result = read_result(folder / name)
    return result is not None and result["state"] == "done"


def _execute(run: SweepRun, folder: Path, train: Train, measure: Measure | None) -> bool:
    """Train one run and write its result; False if a signal stopped it."""
    _log.info("sweep: %s", run.name)
    target = folder / run.name
    prepare_branch(run, folder)
    started = time.monotonic()
    try:
        train(run.config, initial_weights=functools.partial(first_weights, run, folder))
    except DivergedError as error:
        write_json(target / RESULT, failed_result(run, "diverged", str(error)))
        return True
    metrics = read_metrics(target / "metrics.jsonl")
    if not metrics or metrics[-1]["step"] < run.config.train.steps:
        return False
    seconds = time.monotonic() - started
    result = finished_result(run, metrics, seconds)
    if measure is not None:
        result |= measure(target)
    write_json(target / RESULT, result)
    jax.clear_caches()  # compiled programs of one run are of no use to the next, but hold memory
    return True


def _result_of(run: SweepRun, folder: Path) -> dict[str, Any]:
    result = read_result(folder / run.name)
    if result is not None:
        return result
    begun = read_metrics(folder / run.name / "metrics.jsonl")
    if begun:
        return failed_result(run, "unfinished", f"at step {begun[-1]['step']} of {run.config.train.steps}")
    return failed_result(run, "not run", "")


def _lock_path(folder: Path, run: SweepRun) -> Path:
    return folder / f".{run.name}.lock"


@contextmanager
def _claim(folder: Path, run: SweepRun) -> Iterator[bool]:
    """Yield whether this process may work on a run: nobody else is."""
    try:
        file = _lock_path(folder, run).open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def is_claimed(folder: Path, run: SweepRun) -> bool:
    """Whether another process is at a run."""
    with _claim(folder, run) as owned:
        return not owned

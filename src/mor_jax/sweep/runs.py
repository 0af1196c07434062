"""What a sweep is: named configurations, read from a Python or JSON file, each with where it starts from."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_jax import presets
from mor_jax.config import Config, InitStrategy
from mor_jax.config import io as config_io
from mor_jax.errors import UserError, require, suggest

Scale = str
"""Name of a size at which a sweep can be run, such as `debug` or `small`; the sweep's file knows which."""


@dataclass(frozen=True)
class Start:
    """Where a run starts from instead of fresh parameters: another run of the same sweep."""

    run: str
    """Name of the earlier run."""
    step: int | None = None
    """Branch: continue from the checkpoint that the earlier run pinned at this step (an isoFLOP branch)."""
    strategy: InitStrategy | None = None
    """Uptraining: build the shared layers from the earlier run's last checkpoint, which is of a full model."""

    def __post_init__(self) -> None:
        require(
            (self.step is None) != (self.strategy is None),
            f"start from {self.run!r}: exactly one of step={self.step} and strategy={self.strategy!r} must be given",
        )


@dataclass(frozen=True)
class SweepRun:
    """One line of a sweep."""

    name: str
    """Of the run's folder and of its row in the table."""
    config: Config
    """`train.runs` and `train.name` are set by the sweep."""
    group: str = ""
    """Runs of one group differ in their seed only; empty is the name."""
    start: Start | None = None
    """None starts from fresh parameters."""


def load_sweep(path: Path, scale: Scale = "") -> list[SweepRun]:
    """Read the runs of a sweep, in the order in which they matter.

    Args:
        path: a ``.py`` file with ``runs(scale) -> list[SweepRun]``, or a ``.json`` file with ``{"runs": [{"name",
            "preset", "set": {"train.steps": 10}, "group", "start"}]}``.
        scale: passed to a Python file; a JSON file has one scale only.

    Returns:
        The runs; names are unique, and a run that another starts from stands before it.

    Raises:
        UserError: the file cannot be read, or describes no sweep.
    """
    require(path.is_file(), f"{path} is not a sweep file")
    if path.suffix == ".py":
        found = _function_of(path)(scale)
    elif path.suffix == ".json":
        require(not scale, f"--scale {scale!r}: {path} is a JSON sweep, which has one scale only")
        found = _from_json(path)
    else:
        raise UserError(f"{path}: a sweep file ends in .py or .json")
    _check(path, found)
    return found


def first_of_groups(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the first run of every group.

    Raises:
        UserError: one of them starts from a run that is not.
    """
    kept: dict[str, SweepRun] = {}
    for run in runs:
        kept.setdefault(run.group or run.name, run)
    names = {run.name for run in kept.values()}
    for run in kept.values():
        if run.start is not None:
            require(run.start.run in names, f"{run.name!r} starts from {run.start.run!r}, not the first of its group")
    return list(kept.values())


def _function_of(path: Path) -> Callable[[Scale], list[SweepRun]]:
    spec = importlib.util.spec_from_file_location(f"sweep_{path.parent.name}", path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look their module up
    spec.loader.exec_module(module)
    require(hasattr(module, "runs"), f"{path} has no function `runs(scale) -> list[SweepRun]`")
    return module.runs


def _from_json(path: Path) -> list[SweepRun]:
    values = config_io.read_json(path, "JSON file")
    require(isinstance(values, dict) and isinstance(values.get("runs"), list), f"{path} has no list `runs`")
    return [_run_from_json(f"{path}: runs[{index}]", entry) for index, entry in enumerate(values["runs"])]


def _run_from_json(where: str, entry: Any) -> SweepRun:
    kinds = {"name": str, "preset": str, "set": dict, "group": str, "start": dict}
    require(isinstance(entry, dict) and "name" in entry, f"{where} has no `name`")
    for key, value in entry.items():
        require(key in kinds, f"{where}: unknown field {key!r}{suggest(key, kinds)}")
        kind = {str: "a text", dict: "an object"}[kinds[key]]
        known = isinstance(value, kinds[key]) or (key == "start" and value is None)
        require(known, f"{where}: {key}={value!r} is not {kind}")
    config = with_overrides(presets.get(entry.get("preset", "debug")).config, entry.get("set", {}), where)
    start = entry.get("start")
    start = None if start is None else config_io.from_dict(Start, start, f"{where}.start")
    return SweepRun(entry["name"], config, entry.get("group", ""), start)


def with_overrides(config: Config, overrides: dict[str, Any], where: str = "set") -> Config:
    """Return a configuration with some fields replaced.

    Args:
        config: to start from.
        overrides: values by dotted path, such as ``{"model.recursion.num_recursions": 3}``.
        where: named in messages.

    Raises:
        UserError: an unknown field, a value of the wrong type, or a broken rule.
    """
    values = config_io.to_dict(config)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        inner = values
        for name in parents:
            if not isinstance(inner.get(name), dict):
                raise UserError(f"{where}: unknown field {path!r}{suggest(name, inner)}")
            inner = inner[name]
        if last not in inner and path != "train.tensorboard":  # see TrainConfig.upgrade
            raise UserError(f"{where}: unknown field {path!r}{suggest(last, inner)}")
        inner[last] = value
    try:
        return config_io.from_dict(Config, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check(path: Path, runs: Sequence[SweepRun]) -> None:
    are_runs = isinstance(runs, list | tuple) and all(isinstance(run, SweepRun) for run in runs)
    require(are_runs, f"{path}: runs() gave {runs!r:.80}, which is no list of SweepRun")
    require(len(runs) > 0, f"{path} describes no runs")
    seen: dict[str, SweepRun] = {}
    for run in runs:
        require(run.name not in seen, f"{path}: two runs are called {run.name!r}")
        named = run.name not in ("", ".", "..") and "/" not in run.name
        require(named, f"{path}: the name {run.name!r} cannot be a folder's")
        if run.start is not None:
            _check_start(path, run, run.start, seen)
        seen[run.name] = run


def _check_start(path: Path, run: SweepRun, start: Start, seen: dict[str, SweepRun]) -> None:
    require(start.run in seen, f"{path}: {run.name!r} starts from {start.run!r}, which does not stand before it")
    pinned = seen[start.run].config.train.pinned_steps
    require(
        start.step is None or start.step in pinned,
        f"{path}: {run.name!r} starts from step {start.step} of {start.run!r}, which pins only {list(pinned)}",
    )

"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. One that fails never stops training."""

import importlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_jax.paths import is_remote
from mor_jax.runs.metrics import BucketJsonlWriter, JsonlWriter, MetricWriter, Values

_log = logging.getLogger(__name__)
_PROJECT = "mor_jax"
_WANDB_SETTINGS = {"init_timeout": 30.0, "finish_timeout": 60.0, "console": "off"}
"""No network must not hold a run up (seconds); what is printed stays ours."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    folder: Path
    restored_step: int
    """Step that the run continues from; 0 at the start."""
    config: Mapping[str, Any]
    """JSON values of the configuration."""

    @property
    def id(self) -> str:
        """The run's id, made once and kept in its folder, by which a later start finds the same record."""
        path = self.folder / "tracker_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


def flat_values(values: Values) -> dict[str, float | int]:
    """Give the entries of a list a name each: ``{"load_R": [1, 2]}`` is ``{"load_R/0": 1, "load_R/1": 2}``."""
    flat: dict[str, float | int] = {}
    for name, value in values.items():
        entries = {f"{name}/{i}": entry for i, entry in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= entries
    return flat


class TensorBoardWriter:
    """Writes scalars as TensorBoard events; TensorBoard hides those after the restored step of an earlier start."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        if is_remote(run.folder):
            raise OSError(f"events cannot be appended to {run.folder}")
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.restored_step + 1)

    def write(self, step: int, values: Values) -> None:
        """Write every value as a scalar."""
        for name, value in flat_values(values).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what the event file's queue holds."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbWriter:
    """Logs to a run of Weights & Biases, which a later start continues.

    Values are drawn against ``step``, an entry of theirs: the service's own count cannot go back to a checkpoint.
    Without credentials, or when the service does not answer, the record is written offline under ``RUN/wandb``, for
    ``wandb sync``. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the like are the package's own.
    """

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "id": run.id,
            "name": run.folder.name,
            "resume": "allow",
            "allow_val_change": True,
            "config": dict(run.config),
            "settings": _WANDB_SETTINGS,
        }
        if not is_remote(run.folder):
            options["dir"] = str(run.folder)
        self._run = _open_wandb(wandb, options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        """Log the values beside their step."""
        self._run.log({"step": step, **flat_values(values)})

    def flush(self) -> None:
        """The package writes by itself, in a process of its own."""

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        self._run.finish()


def _open_wandb(wandb: Any, options: Mapping[str, Any]) -> Any:
    """Start a run as the environment says: online if there are credentials and the service answers, else offline."""
    if os.environ.get("WANDB_MODE"):
        return wandb.init(**options)
    if not wandb.login(prompt=False):
        _log.info("wandb: no credentials (`wandb login`, or WANDB_API_KEY), so the record is written offline")
        return wandb.init(**options, mode="offline")
    try:
        return wandb.init(**options, mode="online")
    except Exception as error:
        _log.warning("wandb: the service cannot be used, so the record is written offline (%s)", _first_line(error))
        wandb.teardown()  # or its own process still holds the run's id
        return wandb.init(**options, mode="offline")


class TrackioWriter:
    """Logs to a run of Trackio, a local database (TRACKIO_DIR), which a later start finds by the run's name."""

    def __init__(self, run: TrackedRun) -> None:
        trackio: Any = importlib.import_module("trackio")
        name = f"{run.folder.name}-{run.id}"
        self._run = trackio.init(project=_PROJECT, name=name, resume="allow", config=dict(run.config))

    def write(self, step: int, values: Values) -> None:
        """Log the values."""
        self._run.log(flat_values(values), step=step)

    def flush(self) -> None:
        """The package writes by itself, in a thread of its own."""

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[TrackedRun], MetricWriter]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "trackio": TrackioWriter,
}
"""What ``train.trackers`` may name."""


class SafeWriter:
    """A tracker whose first failure is logged and is its end, not the run's.

    Args:
        name: of ``TRACKERS``.
        run: what to track.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name = name
        self._writer: MetricWriter | None = None
        with self._leaving_out("cannot start"):
            self._writer = TRACKERS[name](run)

    def write(self, step: int, values: Values) -> None:
        """Write, while the tracker works."""
        if self._writer is not None:
            with self._leaving_out(f"failed at step {step}"):
                self._writer.write(step, values)

    def flush(self) -> None:
        """Flush, while the tracker works."""
        if self._writer is not None:
            with self._leaving_out("failed"):
                self._writer.flush()

    def close(self) -> None:
        """Close; also a tracker that has worked to the end may fail here."""
        if self._writer is not None:
            with self._leaving_out("failed at its end"):
                self._writer.close()

    @contextmanager
    def _leaving_out(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a package that is not ours, or of its network
            self._writer = None
            missing = isinstance(error, ModuleNotFoundError) and error.name == self._name
            reason = "pip install -e '.[track]'" if missing else f"{type(error).__name__}: {_first_line(error)}"
            _log.warning("train.trackers: %s %s; training goes on without it (%s)", self._name, what, reason)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class Writers:
    """Several writers as one.

    Args:
        writers: each receives everything.
    """

    def __init__(self, *writers: MetricWriter) -> None:
        self._writers = writers

    def write(self, step: int, values: Values) -> None:
        """Write to each."""
        for writer in self._writers:
            writer.write(step, values)

    def flush(self) -> None:
        """Flush each."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Close each."""
        for writer in self._writers:
            writer.close()


def make_writers(
    folder: Path,
    *,
    restored_step: int,
    trackers: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    primary: bool = True,
) -> Writers:
    """Open the writers of a run folder.

    Args:
        folder: the run's.
        restored_step: step that the run continues from; 0 at the start.
        trackers: of ``TRACKERS``; one that fails is logged and left out.
        config: JSON values of the run's configuration, for the trackers.
        primary: only the primary process writes.
    """
    if not primary:
        return Writers()
    lines = BucketJsonlWriter if is_remote(folder) else JsonlWriter
    writer = lines(folder / "metrics.jsonl", restored_step)
    run = TrackedRun(folder, restored_step, config or {})
    return Writers(writer, *(SafeWriter(name, run) for name in trackers))

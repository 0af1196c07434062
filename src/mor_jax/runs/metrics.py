"""Where metrics go: JSON lines always, TensorBoard beside them, anything else behind ``MetricWriter``."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mor_jax.errors import UserError, reason
from mor_jax.paths import is_remote

_log = logging.getLogger(__name__)
_BUCKET_SECONDS = 30.0
Values = Mapping[str, float | int | list[float]]


class MetricWriter(Protocol):
    """Receives the metrics of a step."""

    def write(self, step: int, values: Values) -> None:
        """Record ``values`` as they were after ``step`` optimiser steps."""
        ...

    def flush(self) -> None:
        """Make what was recorded outlive this process: called before every checkpoint."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, none if it does not exist; a last line that was cut off is left out.

    Raises:
        UserError: another line is not a JSON object with a `step`.
    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values.append(json.loads(line))
            values[-1]["step"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with a step ({reason(error)})") from error
    return values


def _kept_lines(path: Path, restored_step: int) -> str:
    kept = [line for line in read_metrics(path) if line["step"] <= restored_step]
    return "".join(json.dumps(line) + "\n" for line in kept)


class JsonlWriter:
    """Appends one JSON object a line, flushed at once.

    Args:
        path: of metrics.jsonl, a local file.
        restored_step: lines after this step are dropped first: the resumed run writes them again.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        part = path.with_name(path.name + ".part")
        part.write_text(_kept_lines(path, restored_step), encoding="utf-8")
        part.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        """Append ``{"step": step, **values}``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BucketJsonlWriter:
    """Writes the lines of ``JsonlWriter`` to a bucket, whose files can only be replaced: as a whole, twice a minute.

    Args:
        path: of metrics.jsonl, ``gs://...``.
        restored_step: lines after this step are dropped first.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        self._path, self._text, self._written = path, _kept_lines(path, restored_step), 0.0
        self.flush()

    def write(self, step: int, values: Values) -> None:
        """Add ``{"step": step, **values}``."""
        self._text += json.dumps({"step": step, **values}) + "\n"
        if time.monotonic() - self._written > _BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Replace the file."""
        self._path.write_text(self._text, encoding="utf-8")
        self._written = time.monotonic()

    def close(self) -> None:
        """Replace the file for the last time."""
        self.flush()


class TensorBoardWriter:
    """Writes scalars as TensorBoard events; the entries of a list get a tag each.

    Args:
        folder: of the event files.
        restored_step: TensorBoard hides events after this step that an interrupted start wrote.
    """

    def __init__(self, folder: Path, restored_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=restored_step + 1)

    def write(self, step: int, values: Values) -> None:
        """Write every value as a scalar."""
        for name, value in values.items():
            entries = value if isinstance(value, list) else [value]
            tags = [f"{name}/{i}" for i in range(len(entries))] if isinstance(value, list) else [name]
            for tag, entry in zip(tags, entries, strict=True):
                self._writer.add_scalar(tag, entry, step)

    def flush(self) -> None:
        """Write what the event file's queue holds."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


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


def make_writers(folder: Path, *, restored_step: int, tensorboard: bool, primary: bool = True) -> Writers:
    """Open the writers of a run folder.

    Args:
        folder: the run's.
        restored_step: step that the run continues from; 0 at the start.
        tensorboard: whether to write event files under `tensorboard/`.
        primary: only the primary process writes.
    """
    if not primary:
        return Writers()
    if is_remote(folder):
        if tensorboard:
            _log.info("no TensorBoard events: they cannot be appended to %s", folder)
        return Writers(BucketJsonlWriter(folder / "metrics.jsonl", restored_step))
    writers: list[MetricWriter] = [JsonlWriter(folder / "metrics.jsonl", restored_step)]
    if tensorboard:
        writers.append(TensorBoardWriter(folder / "tensorboard", restored_step))
    return Writers(*writers)

"""Where metrics go: JSON lines always (here), trackers beside them (``trackers``), both behind ``MetricWriter``."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mor_jax.errors import UserError, reason

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


def is_finite(value: float | int | list[float]) -> bool:
    """Whether a value, or every entry of a list, is a number that JSON can hold."""
    return all(map(math.isfinite, value if isinstance(value, list) else [value]))


def _line(step: int, values: Values) -> str:
    """A line of JSON, which knows no NaN and no infinity: what is not finite is left out, and told."""
    bad = [name for name, value in values.items() if not is_finite(value)]
    if bad:
        _log.warning("step %d: %s not finite, and left out of metrics.jsonl", step, ", ".join(bad))
    kept = {name: value for name, value in values.items() if name not in bad}
    return json.dumps({"step": step, **kept}, allow_nan=False) + "\n"


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
        self._file.write(_line(step, values))
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
        self._text += _line(step, values)
        if time.monotonic() - self._written > _BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Replace the file."""
        self._path.write_text(self._text, encoding="utf-8")
        self._written = time.monotonic()

    def close(self) -> None:
        """Replace the file for the last time."""
        self.flush()

"""The folder of a run: who owns it, and refusing to mix two configurations, or two runs at the same time, in one."""

import fcntl
import fnmatch
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.errors import UNUSABLE_PATH, UserError, require
from mor_jax.mesh.processes import gather_texts, is_primary
from mor_jax.paths import is_remote, to_path

MAY_DIFFER = (
    "perf.*",
    "mesh.*",
    "data.source",
    "data.workers",
    "data.cache",
    "train.log_every",
    "train.eval_every",
    "train.eval_rows",
    "train.save_every",
    "train.keep",
    "train.pinned_steps",
    "train.runs",
    "train.name",
    "train.trackers",
    "train.watchdog_seconds",
    "train.pictures",
)
"""Fields that a resumed run may change; `train.steps` may grow, unless it would move the stages of
`train.growth`. A corpus may have moved: its hash is compared."""

_CANNOT_WRITE_WORDS = ("No space left on device", "Read-only file system", "Disk quota exceeded", "Permission denied")


def run_folder(config: Config) -> Path:
    """Return the run's folder: ``train.runs / (train.name or preset)``."""
    return to_path(config.train.runs) / (config.train.name or config.preset)


def check_run_folder(config: Config) -> Path:
    """Return the run's folder if this configuration may start or continue a run there; writes nothing.

    Raises:
        UserError: the folder holds a run of another configuration (names the fields), or checkpoints of nobody.
    """
    folder = run_folder(config)
    path, checkpoints = folder / "config.json", folder / "checkpoints"
    if path.exists():
        _check_same(config_io.load(Config, path), config, folder)
    elif checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise UserError(f"{folder} holds checkpoints but no config.json, so it cannot be told whose they are")
    return folder


def claim_run_folder(config: Config) -> Path:
    """Create the run's folder if it is missing and save the configuration in it, in one rename.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run_folder(config)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "config.json.part"
        config_io.save(config, part)
        part.replace(folder / "config.json")
    return folder


class RunLock:
    """Context that keeps a run folder for one run at a time, from ``acquire`` on until its end or the process's.

    Process 0 locks ``RUN/.lock``. Buckets, and file systems without locks, are not guarded.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def acquire(self) -> None:
        """Take the lock; creates the folder if it is missing.

        Raises:
            UserError: another run trains there, or the folder cannot be written; in all processes.
        """
        problem = ""
        if is_primary() and not is_remote(self._folder):
            try:
                self._lock()
            except UserError as error:
                problem = str(error)
        found = next((text for text in gather_texts(problem) if text), "")
        require(not found, found)

    def _lock(self) -> None:
        with writing_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(
                f"{self._folder} is being trained by {holder}: wait for its end, or choose another --train.name"
            ) from error
        except OSError:  # no locks there
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()


def _check_same(old: Config, new: Config, folder: Path) -> None:
    lines = [
        line
        for line in config_io.differences(old, new)
        if not any(fnmatch.fnmatchcase(line.split(":")[0], pattern) for pattern in MAY_DIFFER)
        and not (line.startswith("train.steps:") and new.train.steps > old.train.steps and not old.train.growth)
    ]
    if lines and old.train.growth and old.train.growth == new.train.growth and old.train.steps != new.train.steps:
        lines.append("train.growth's stages are shares of train.steps")
    if lines:
        raise UserError(
            f"{folder} holds a run of another configuration: {'; '.join(lines)} (choose another --train.name)"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn "disk full", "read-only" and the like into one ``UserError``; other errors pass.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno not in UNUSABLE_PATH:
            raise
        raise UserError(f"{error.filename or folder} cannot be written: {os.strerror(error.errno)}") from error
    except Exception as error:  # TensorStore reports a full disk as ValueError
        words = next((words for words in _CANNOT_WRITE_WORDS if words in str(error)), None)
        if words is None:
            raise
        raise UserError(f"{folder} cannot be written: {words}") from error

"""What a person sees while a run trains: a bar with ETA on a terminal, one plain line per log otherwise."""

import logging
import math
import sys
from typing import IO, Any, cast

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mor_jax.array_types import Params
from mor_jax.config import Config
from mor_jax.mesh.processes import host_names
from mor_jax.runs.optimizer import make_schedule
from mor_jax.train.goodput import describe_peak
from mor_jax.versions import installed_versions

_log = logging.getLogger(__name__)
_HOSTS_SHOWN = 8
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("validation_nll", "held-out {:.4f}"),
    ("validation_topk_nll", "held-out top-k {:.4f}"),
    ("validation_threshold_nll", "causal {:.4f}"),
    ("learning_rate", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("mfu", "MFU {:.1%}"),
)


def format_values(values: dict[str, Any]) -> str:
    """Return the values worth a glance on one line."""
    return "  ".join(text.format(values[name]) for name, text in _SHOWN if name in values)


def roll_call(params: Params, mesh: Mesh, attention: str) -> str:
    """Say what trains where: a run's first line. All processes must call it."""
    device, hosts = mesh.devices.flat[0], host_names()
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    shown = ", ".join(hosts if len(hosts) <= _HOSTS_SHOWN else [*hosts[:_HOSTS_SHOWN], "..."])
    versions = ", ".join(" ".join(item) for item in installed_versions(("mor-jax", "jax", "jaxlib", "flax")).items())
    return (
        f"{parameters:,} parameters, {len(hosts)} process{'es' * (len(hosts) > 1)} ({shown}), "
        f"{mesh.size} x {device.device_kind} ({device.platform}), mesh {dict(mesh.shape)}, "
        f"attention {attention}, peak {describe_peak(device)}, {versions}"
    )


def describe_rising_rate(old: Config, new: Config, start: int) -> str | None:
    """Say that a run which goes on under more steps than before raises its learning rate again, or None if not.

    Args:
        old: configuration of the start before.
        new: of this one.
        start: steps done.
    """
    if not start or old.train.steps == new.train.steps:
        return None
    before, after = (make_schedule(config.optimizer, config.train.steps) for config in (old, new))
    last, planned, following = float(before(start - 1)), float(before(start)), float(after(start))
    if following <= max(last, planned) * (1 + 1e-6):  # during warm-up it would have risen in any case
        return None
    return (
        f"the learning rate rises again: step {start} had {last:.2e}, step {start + 1} has {following:.2e}, as "
        f"train.steps={old.train.steps} had decayed it and train.steps={new.train.steps} does not yet"
    )


class SafeStream:
    """A stream whose reader may leave: a closed terminal or pipe must not end a run before it has saved.

    Args:
        stream: where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text once nobody can read it any more."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless nobody can read it any more."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: str) -> None:
        if self._gone:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: of a file that is closed
            self._gone = True
            _log.warning("what is printed is no longer read (%s); the run goes on", error)


class Reporter:
    """Progress of a run; silent in all processes but the first.

    Args:
        steps: of the whole run.
        start: steps already done.
        console: where to; None is stdout.
    """

    def __init__(self, steps: int, start: int, console: Console | None = None) -> None:
        self._primary = jax.process_index() == 0
        self._steps = steps
        stdout = cast(IO[str], SafeStream(sys.stdout))
        self._console = console or Console(file=stdout, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        if self._primary and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, values="")
            self._bar.start()

    def say(self, line: str) -> None:
        """Print one line."""
        if self._primary:
            self._console.print(line, markup=False)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Show a step's metrics: beside the bar, or as a plain line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=format_values(values))
        else:
            self.say(f"step {step}/{self._steps}  {format_values(values)}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

"""What a person sees while a run trains: a bar with ETA on a terminal, one plain line per log otherwise."""

import sys
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SHOWN = (
    ("loss", "loss {:.4f}"),
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
        self._console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
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

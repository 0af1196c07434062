"""The stretches of steps that one compiled program trains: stages of growth, and warm-ups of routing in them."""

import dataclasses
from dataclasses import dataclass

from mor_jax.config import Config, Execution, Stage
from mor_jax.model.routing.capacity import warmup_steps


@dataclass(frozen=True)
class Phase:
    """Steps of one program."""

    start: int
    """0-based first step."""
    end: int
    """The step after its last."""
    stage: Stage
    execution: Execution

    @property
    def description(self) -> str:
        """What it is, on one line."""
        return f"steps {self.start + 1} to {self.end} ({self.stage.description}, {self.execution})"

    def executed(self, config: Config) -> Config:
        """Return the run's configuration as this phase executes it."""
        return dataclasses.replace(config, perf=dataclasses.replace(config.perf, execution=self.execution))


def phases(config: Config) -> list[Phase]:
    """List the phases of a run, in order: they follow from the configuration alone, whatever was resumed.

    Args:
        config: of the run; a warm-up of routing runs as `scan`, whose shapes do not depend on the step.
    """
    found, wanted = [], config.perf.execution
    for stage in config.stages:
        warmup = warmup_steps(stage.model)
        border = min(max(stage.start, stage.routed_from + warmup), stage.end) if warmup else stage.start
        if border > stage.start and wanted != "scan":
            found.append(Phase(stage.start, border, stage, "scan"))
        else:
            border = stage.start
        if border < stage.end:
            found.append(Phase(border, stage.end, stage, wanted))
    return found

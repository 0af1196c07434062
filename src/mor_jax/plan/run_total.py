"""What a whole run takes, from its first stage of growth to its last: FLOPs, a bound on its time, and its memory."""

from typing import Any

from mor_jax.config import Config, Stage
from mor_jax.model.flops import run_flops
from mor_jax.plan.compile import DoesNotFitError, compile_step
from mor_jax.plan.report import report
from mor_jax.plan.topology import Topology


def with_run_total(plan: dict[str, Any], config: Config, topology: Topology) -> dict[str, Any]:
    """Add `run` to the plan of a run's last stage; earlier stages, if any, are compiled for it.

    The step's memory becomes that of the stage that needs the most: a stage without router computes more tokens than
    one that routes.

    Args:
        plan: from ``report`` of the last stage.
        config: of the run.
        topology: from ``describe_topology``.

    Raises:
        DoesNotFitError: an earlier stage exceeds the memory of a chip.
    """
    *earlier, last = config.stages
    plans = [_plan(stage, config, topology) for stage in earlier]
    stages = [_described(stage, config, of) for stage, of in zip((*earlier, last), (*plans, plan), strict=True)]
    seconds = sum(stage["steps"] * stage["seconds_per_step_at_least"] for stage in stages)
    largest = max((*plans, plan), key=lambda of: of["memory_per_device"]["total"])
    run = {"flops": run_flops(config), "seconds_at_least": seconds, "stages": stages}
    return plan | {"memory_per_device": largest["memory_per_device"], "run": run}


def _plan(stage: Stage, config: Config, topology: Topology) -> dict[str, Any]:
    try:
        return report(compile_step(config, topology, stage), [])
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{stage.description}: {error}", error.needed) from error


def _described(stage: Stage, config: Config, plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": stage.description,
        "steps": stage.end - stage.start,
        "flops": run_flops(config, stage.start, stage.end),
        "seconds_per_step_at_least": max(plan["estimate"]["seconds"].values()),
        "memory": plan["memory_per_device"]["total"],
    }

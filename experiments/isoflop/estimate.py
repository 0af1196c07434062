"""What will the comparison cost? python experiments/isoflop/estimate.py [--devices 2] [--processes 3]

Made-up losses (a scaling law) unfold the plan, workers take its runs in order, and each run lasts as long as
``seconds_of`` says. The law only decides which runs there are: no figure of it is a result.
"""

import heapq
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import launch  # noqa: F401  the driver's place
import tyro
from choices import short
from comparison import STAGES, Comparison
from families import BUDGETS, CONFIRMATION

from mor_jax.config import Config
from mor_jax.model.flops import block_parameters, count_parameters, run_flops
from mor_jax.sweep.runs import SweepRun

Result = dict[str, Any]
_BESIDE = {"vanilla": 50.0, "recursive": 65.0, "mor": 90.0, "grown": 105.0}
"""Seconds of a run beside its steps: compiling, validation, measuring one text, saving. The ablation's runs took 94 s
(vanilla, width 256) and 134 s (MoR, width 320), 79 and 75 of them steps, and about 35 s more to measure two texts."""
_SECOND_TEXT = 15.0
_TOKEN_SECONDS, _FLOPS_PER_SECOND = 0.24e-6, 4.3e14
"""A token's seconds on an H200 that nobody shares: the first, and its training FLOPs over the second. Steps of 12.0 and
14.6 ms (vanilla, widths 224 and 320), 9.1 and 12.9 (MoR N_r = 2, 256 and 384) were measured by one process alone, with
a probe that was not kept."""
LARGEST = {scale: (BUDGETS[scale][-1], CONFIRMATION[scale][1]) for scale in BUDGETS}


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    scale: str = "full"
    devices: int = 2
    processes: int = 3
    """That share a device."""
    tries: bool = False
    """Let the made-up MoR lose, so that there are tries."""


def seconds_of(config: Config, name: str, processes: int = 3) -> float:
    """Estimate how long a run takes where so many processes share an H200."""
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    beside = _BESIDE[name.split("-")[0]] + _SECOND_TEXT * measured_on_val(name)
    return beside + processes * (tokens * _TOKEN_SECONDS + run_flops(config) / _FLOPS_PER_SECOND)


def measured_on_val(name: str) -> bool:
    """Whether a run is measured on the third text, too: at the largest budgets, whose models are told by source."""
    return any(f"-{short(budget)}-" in name for budgets in LARGEST.values() for budget in budgets)


def made_up_loss(run: SweepRun, phi: float = 0.5) -> float:
    """Loss by a law, its best rate 8e-3 at 1e15 FLOPs, and a little for the seed; no measurement."""
    config, model = run.config, run.config.model
    shared = 0 if model.recursion.sharing == "none" else block_parameters(model)
    passes = sum(model.capacities)
    size = count_parameters(model).non_embedding + (passes**phi - 1) * shared
    tokens = config.train.steps * config.train.batch_size * model.context_length
    best_rate = 8e-3 * (run_flops(config) / 1e15) ** -0.125
    off = max(config.optimizer.learning_rate / best_rate, best_rate / config.optimizer.learning_rate) - 1
    return 1.5 + 105 * size**-0.33 + 3500 * tokens**-0.47 + 0.02 * off + 1e-3 * (config.train.seed * 7 % 5)


def unfold(
    comparison: Comparison, workers: int, loss: Callable[[SweepRun], float] = made_up_loss, processes: int = 3
) -> tuple[dict[str, Result], list[tuple[float, str, SweepRun]]]:
    """Let workers take runs of the plan in order until none is left.

    Args:
        comparison: gives the plan.
        workers: processes on all devices.
        loss: of a run.
        processes: that share a device.

    Returns:
        The made-up results by name, and (second of its end, stage, run) of every run in the order of its end.
    """
    results: dict[str, Result] = {}
    busy: list[tuple[float, str, str, SweepRun]] = []
    taken: set[str] = set()
    ended: list[tuple[float, str, SweepRun]] = []
    now = 0.0
    while True:
        for stage, runs in comparison.stages(results).items():
            for run in runs:
                if len(busy) < workers and run.name not in taken:
                    taken.add(run.name)
                    seconds = seconds_of(run.config, run.name, processes)
                    heapq.heappush(busy, (now + seconds, run.name, stage, run))
        if not busy:
            return results, ended
        now, name, stage, run = heapq.heappop(busy)
        results[name] = made_up_result(run, loss(run))
        ended.append((now, stage, run))


def made_up_result(run: SweepRun, loss: float) -> Result:
    """A result with what the plan reads."""
    return {"name": run.name, "state": "done", "nll": loss}


def cost_table(ended: list[tuple[float, str, SweepRun]], processes: int) -> str:
    """Return what every stage costs: runs, process seconds, and the minute in which its last run ends."""
    lines = ["| stage | runs | FLOPs | process minutes | ends at minute |", "|---|---|---|---|---|"]
    for stage in STAGES:
        of_stage: list[tuple[float, Config, str]] = [(end, r.config, r.name) for end, s, r in ended if s == stage]
        if of_stage:
            flops = sum(run_flops(c) for _, c, _ in of_stage)
            seconds = sum(seconds_of(c, n, processes) for _, c, n in of_stage)
            last = max(end for end, _, _ in of_stage)
            lines.append(f"| {stage} | {len(of_stage)} | {flops:.2g} | {seconds / 60:.0f} | {last / 60:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the estimate."""
    options = tyro.cli(Arguments, description=__doc__)

    def loss(run: SweepRun) -> float:
        loses = options.tries and run.name.startswith(("mor", "grown"))
        return made_up_loss(run) + 0.1 * loses

    workers = options.devices * options.processes
    _, ended = unfold(Comparison(options.scale), workers, loss, options.processes)
    print(cost_table(ended, options.processes), end="")
    flops = sum(run_flops(run.config) for _, _, run in ended)
    print(f"\n{len(ended)} runs, {flops:.2g} FLOPs, {ended[-1][0] / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

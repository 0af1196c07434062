"""Plans isoFLOP sweeps: the steps that spend a budget, and smaller budgets as branches of the largest one's run.

Under the WSD schedule every budget of one model shares the warm-up and the stable phase. Only the largest is trained
from the start; it pins a checkpoint where each smaller budget begins to decay, and a branch goes on from there (paper
section 3.2 and table 9).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mor_jax.config import Config, GrowthStage, ModelConfig, stage_models
from mor_jax.errors import require
from mor_jax.model.flops import paper_flops_per_token, train_flops_per_token
from mor_jax.sweep.runs import Start, SweepRun

Count = Literal["paper", "training"]
"""What a budget counts: the paper's forward FLOPs, or every product of the training step (head and backward too)."""


def steps_for(
    model: ModelConfig,
    budget: float,
    batch_size: int,
    count: Count = "paper",
    growth: Sequence[GrowthStage] = (),
) -> int:
    """Return the optimiser steps that spend a budget.

    Args:
        model: capacities are those after every warm-up.
        budget: FLOPs.
        batch_size: rows per step.
        count: what the budget counts.
        growth: stages before the model, which count by their own models.

    Raises:
        UserError: the budget does not reach for one step.
    """
    of_model = paper_flops_per_token if count == "paper" else train_flops_per_token
    per_token = sum(share * of_model(stage) for share, stage in stage_models(model, growth))
    steps = round(budget / (per_token * batch_size * model.context_length))
    require(steps > 0, f"budget={budget:g} FLOPs is less than one step of {batch_size} rows")
    return steps


def with_steps(config: Config, steps: int, pinned_steps: Sequence[int] = ()) -> Config:
    """Return a configuration that trains for ``steps`` and keeps the checkpoints of ``pinned_steps``."""
    train = dataclasses.replace(config.train, steps=steps, pinned_steps=tuple(pinned_steps))
    return dataclasses.replace(config, train=train)


def with_scaled_steps(config: Config, factor: float) -> Config:
    """Return a configuration that trains ``factor`` times as long, with every warm-up the same share of it as before.

    Steps that start from another run's pinned checkpoint are numbers, not shares: ``train.pinned_steps`` stays.
    """

    def scaled(steps: int) -> int:
        return max(min(steps, 1), round(factor * steps))  # a warm-up of none stays none

    def warmups(part: Any) -> Any:
        return dataclasses.replace(part, **{k: scaled(v) for k, v in vars(part).items() if k.endswith("warmup_steps")})

    return dataclasses.replace(
        config,
        optimizer=warmups(config.optimizer),
        model=dataclasses.replace(config.model, routing=warmups(config.model.routing)),
        train=dataclasses.replace(config.train, steps=scaled(config.train.steps)),
    )


def plan_isoflop(
    models: Mapping[str, Config], budgets: Sequence[float], *, count: Count = "paper", branches: bool = True
) -> list[SweepRun]:
    """Plan every model at every budget.

    Args:
        models: configuration of each size, by name; their `train.steps` are replaced.
        budgets: FLOPs, in any order.
        count: what a budget counts.
        branches: whether smaller budgets branch off the largest one's run (needs the schedule `wsd`); otherwise every
            run is trained from the start, as what grows must be.

    Returns:
        Runs ``NAME-BUDGET``, the largest budget of each model before its branches.

    Raises:
        UserError: no budgets, one that is too small for a branch to begin after the warm-up, or another schedule.
    """
    require(len(budgets) > 0, "an isoFLOP plan needs at least one budget")
    runs = []
    for name, config in models.items():
        schedule = config.optimizer.schedule
        require(not branches or schedule == "wsd", f"branches need optimizer.schedule='wsd', not {schedule!r}")
        growth, rows = config.train.growth, config.train.batch_size
        require(not (branches and growth), f"{name} has train.growth, whose stages depend on train.steps: no branches")
        steps = {budget: steps_for(config.model, budget, rows, count, growth) for budget in budgets}
        largest, *smaller = sorted(steps, reverse=True)
        pinned = {budget: _branch_step(config, name, budget, steps[budget]) for budget in smaller} if branches else {}
        trunk = f"{name}-{largest:.3g}"
        runs.append(SweepRun(trunk, with_steps(config, steps[largest], sorted(set(pinned.values())))))
        for budget in smaller:
            start = Start(trunk, step=pinned[budget]) if branches else None
            runs.append(SweepRun(f"{name}-{budget:.3g}", with_steps(config, steps[budget]), start=start))
    return runs


def _branch_step(config: Config, name: str, budget: float, steps: int) -> int:
    """Last step of the stable phase: there the learning rate is still the peak."""
    step = steps - round(config.optimizer.decay_share * steps)
    warmup = config.optimizer.warmup_steps
    require(
        step >= max(warmup, 1),
        f"{name} at budget={budget:g} has {steps} steps and would branch at step {step}, within the "
        f"optimizer.warmup_steps={warmup}",
    )
    return step

"""Uptraining: recursive models made from a trained vanilla model, by initialisation strategy (table 12)."""

import dataclasses
from typing import get_args

from mor_jax.model.sharing import Strategy
from mor_jax.sweep.isoflop import with_steps
from mor_jax.sweep.recipes import expert, recursive, seeded, vanilla
from mor_jax.sweep.runs import Start, SweepRun

SHARE = 0.25
"""Steps of uptraining over those of the vanilla model (the paper: 5B of 600B tokens)."""


def runs(scale: str) -> list[SweepRun]:
    """Return the vanilla model, then N_r = 2 models that start from it, and one that starts from nothing."""
    full = vanilla(scale)
    steps = max(1, round(SHARE * full.train.steps))
    first = seeded("vanilla", full)
    name, config = first[0].name, with_steps(recursive(scale, 2), steps)
    started = [
        dataclasses.replace(run, start=Start(name, strategy=strategy))
        for strategy in get_args(Strategy)
        for run in seeded(f"recursive-{strategy}", config)
    ]
    routed = [
        dataclasses.replace(run, start=Start(name, strategy="stepwise"))
        for run in seeded("expert-stepwise", with_steps(expert(scale, 2), steps))
    ]
    return [*first, *started, *routed, *seeded("recursive-fresh", config)]

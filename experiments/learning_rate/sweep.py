"""Is one learning rate fair to all? Each family at three rates and equal training FLOPs."""

import dataclasses

from mor_jax.config import Config
from mor_jax.sweep.isoflop import with_scaled_steps
from mor_jax.sweep.recipes import at_flops_of, expert, recursive, seeded, vanilla
from mor_jax.sweep.runs import SweepRun

RATES = {"debug": (1e-3, 3e-3), "mini": (6e-3, 3e-3, 1.2e-2), "long": (2e-3, 1e-3, 4e-3), "large": (1.5e-3, 3e-3)}
"""In the order of their weight; but for `debug`, what the scale's other experiments use, then half or twice that."""
SMALL_RATES = (1e-3, 3e-3, 5e-4)
"""Scale `small`: around the usual rate of small models, then the paper's, then lower."""
SHARE = {"mini": 1.0, "long": 1.0, "large": 1.0}
"""Steps over those of the other experiments."""
SMALL_SHARE = 0.3125
"""Other scales: 250 steps for the vanilla model of `small`."""


def runs(scale: str) -> list[SweepRun]:
    """Return vanilla, MoR of N_r = 2 and the recursive model of N_r = 3, rate by rate."""
    baseline = vanilla(scale)
    baseline = with_scaled_steps(baseline, SHARE.get(scale, SMALL_SHARE))
    models = {"vanilla": baseline, "expert-r2": expert(scale, 2), "recursive-r3": recursive(scale, 3)}
    matched = {name: at_flops_of(config, baseline) for name, config in models.items()}
    return [
        run
        for rate in RATES.get(scale, SMALL_RATES)
        for name, config in matched.items()
        for run in seeded(f"{name}-lr{rate:g}", _at_rate(config, rate))
    ]


def _at_rate(config: Config, rate: float) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))

"""Capacities of expert-choice and their warm-up, at equal training FLOPs (table 13, "capacity warm-up")."""

from mor_jax.sweep.recipes import at_flops_of, expert, seeded, vanilla
from mor_jax.sweep.runs import SweepRun

CAPACITIES = {
    "default": None,
    "high": (1.0, 0.85, 0.7),
    "low": (1.0, 0.5, 0.25),
    "flat": (1.0, 0.5, 0.5),
    "first-drops": (0.8, 0.55, 0.3),
}


def runs(scale: str) -> list[SweepRun]:
    """Return N_r = 3 models; the warm-up lasts a tenth of the run."""
    baseline = vanilla(scale)
    models = {name: at_flops_of(expert(scale, 3, capacities=c), baseline) for name, c in CAPACITIES.items()}
    warmup = max(1, models["default"].train.steps // 10)
    models["warm-up"] = at_flops_of(expert(scale, 3, capacity_warmup_steps=warmup), baseline)
    return [run for name, config in models.items() for run in seeded(name, config)]

"""Beyond the paper: a gate on the block's change, x + g (block(x) - x), against the paper's x + g block(x)."""

from mor_jax.sweep.recipes import at_flops_of, expert, seeded, vanilla
from mor_jax.sweep.runs import SweepRun

MORE_SEEDS = (1, 2)
"""Of the three forms; the paper's are then runs of mor_vs_baselines."""


def runs(scale: str) -> list[SweepRun]:
    """Return N_r = 3 models at equal training FLOPs; `alpha` is the gate's largest value."""
    baseline = vanilla(scale)
    models = {
        "plain-alpha-2": expert(scale, 3, residual="plain", alpha=2.0),
        "plain-alpha-1": expert(scale, 3, residual="plain", alpha=1.0),
        "paper-loss-0.01": expert(scale, 3, sampling_coefficient=0.01),
        "plain-alpha-2-loss-0.01": expert(scale, 3, residual="plain", alpha=2.0, sampling_coefficient=0.01),
        "paper": expert(scale, 3),
    }
    runs = [run for name, config in models.items() for run in seeded(name, at_flops_of(config, baseline))]
    more = [(seed, name) for seed in MORE_SEEDS for name in ("plain-alpha-1", "plain-alpha-2", "paper")]
    return runs + [run for seed, name in more for run in seeded(name, at_flops_of(models[name], baseline), (seed,))]

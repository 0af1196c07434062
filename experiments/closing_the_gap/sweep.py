"""Beyond the paper: a gate on the block's change, x + g (block(x) - x), against the paper's x + g block(x)."""

from mor_jax.sweep.recipes import at_flops_of, expert, seeded, vanilla
from mor_jax.sweep.runs import SweepRun


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
    return [run for name, config in models.items() for run in seeded(name, at_flops_of(config, baseline))]

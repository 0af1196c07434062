"""How many recursions: N_r = 2, 3, 4 of MoR and of the recursive Transformer at equal training FLOPs (table 3)."""

from mor_jax.sweep.recipes import at_flops_of, expert, recursive, seeded, vanilla
from mor_jax.sweep.runs import SweepRun


def runs(scale: str) -> list[SweepRun]:
    """Return both families, smaller N_r first."""
    baseline = vanilla(scale)
    models = {"vanilla": baseline}
    for count in (2, 3, 4):
        models[f"expert-r{count}"] = at_flops_of(expert(scale, count), baseline)
        models[f"recursive-r{count}"] = at_flops_of(recursive(scale, count), baseline)
    return [run for name, config in models.items() for run in seeded(name, config)]

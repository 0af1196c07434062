"""MoR against the recursive and the vanilla Transformer, at equal training FLOPs and at equal tokens (table 3)."""

from mor_jax.sweep.recipes import at_flops_of, expert, recursive, seeded, token, vanilla
from mor_jax.sweep.runs import SweepRun

MAIN_SEEDS = (0, 1, 2)


def runs(scale: str) -> list[SweepRun]:
    """Return the main comparison over seeds, then the rest with one seed."""
    baseline = vanilla(scale)
    main = {
        "vanilla": baseline,
        "expert-r2": at_flops_of(expert(scale, 2), baseline),
        "expert-r3": at_flops_of(expert(scale, 3), baseline),
        "recursive-r3": at_flops_of(recursive(scale, 3), baseline),
    }
    rest = {
        "expert-r3-share": at_flops_of(expert(scale, 3, kv="shared"), baseline),
        "token-r3": at_flops_of(token(scale, 3), baseline),
        "expert-r2-equal-tokens": expert(scale, 2),
        "expert-r3-equal-tokens": expert(scale, 3),
        "recursive-r2": at_flops_of(recursive(scale, 2), baseline),
    }
    first = [run for name, config in {**main, **rest}.items() for run in seeded(name, config, MAIN_SEEDS[:1])]
    others = [run for seed in MAIN_SEEDS[1:] for name, config in main.items() for run in seeded(name, config, (seed,))]
    return first + others

"""Which unrolled layer shares which parameters: cycle, sequence, middle_cycle, middle_sequence (table 10)."""

from typing import get_args

from mor_jax.config import Sharing
from mor_jax.sweep.recipes import recursive, seeded, vanilla
from mor_jax.sweep.runs import SweepRun


def runs(scale: str) -> list[SweepRun]:
    """Return the vanilla model and the recursive ones of N_r = 2 and 3, at equal tokens."""
    kinds = [kind for kind in get_args(Sharing) if kind != "none"]
    models = {f"{kind}-r{count}": recursive(scale, count, sharing=kind) for count in (2, 3) for kind in kinds}
    return [run for name, config in {"vanilla": vanilla(scale), **models}.items() for run in seeded(name, config)]

"""Test-time scaling: loss when the depth is capped at 1, ..., N_r passes (paper section 4.3)."""

from mor_jax.sweep.recipes import expert, recursive, seeded, token
from mor_jax.sweep.runs import SweepRun


def runs(scale: str) -> list[SweepRun]:
    """Return models of N_r = 4 at equal tokens; run with --depth-curve."""
    models = {"expert-r4": expert(scale, 4), "recursive-r4": recursive(scale, 4), "token-r4": token(scale, 4)}
    return [run for name, config in models.items() for run in seeded(name, config)]

"""Keys and values: recursion-wise caching, recursive sharing, and the hybrid (tables 2 and 3, figure 5)."""

from typing import get_args

from mor_jax.config import KvStrategy
from mor_jax.sweep.recipes import expert, recursive, seeded, token
from mor_jax.sweep.runs import SweepRun


def runs(scale: str) -> list[SweepRun]:
    """Return N_r = 3 models under every strategy, at equal tokens."""
    models = {f"expert-{kv}": expert(scale, 3, kv=kv) for kv in get_args(KvStrategy)}
    models |= {f"{kind}-{kv}": make(scale, 3, kv=kv) for kind, make in _OTHERS.items() for kv in _TWO}
    return [run for name, config in models.items() for run in seeded(name, config)]


_TWO: tuple[KvStrategy, ...] = ("recursion", "shared")
_OTHERS = {"recursive": recursive, "token": token}

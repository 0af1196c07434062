"""IsoFLOP curves of the vanilla Transformer and of MoR: best size and loss by budget (table 9, figure 3)."""

import dataclasses

from mor_jax.config import Config
from mor_jax.errors import UserError
from mor_jax.sweep.isoflop import plan_isoflop
from mor_jax.sweep.recipes import expert, vanilla
from mor_jax.sweep.runs import SweepRun

WIDTHS = {
    "debug": (16, 32, 48),
    "mini": (32, 64, 96),
    "small": (128, 192, 256, 384),
    "long": (128, 192, 256, 384),
    "large": (384, 512, 768, 1024),
}
BUDGETS = {
    "debug": (2e9, 4e9),
    "mini": (1e12, 2e12),
    "small": (5e14, 1e15, 2e15),
    "long": (5e14, 1e15, 2e15),
    "large": (7e15, 1.4e16, 2.8e16),
}
"""Exact training FLOPs."""


def runs(scale: str) -> list[SweepRun]:
    """Return both families: every width at every budget, smaller budgets as branches."""
    if scale not in WIDTHS:
        raise UserError(f"--scale {scale!r} is not one of {', '.join(WIDTHS)}")
    families = {"vanilla": vanilla(scale), "expert-r3": expert(scale, 3)}
    models = {f"{name}-d{d}": at_width(config, d) for name, config in families.items() for d in WIDTHS[scale]}
    return plan_isoflop(models, BUDGETS[scale], count="training")


def at_width(config: Config, width: int) -> Config:
    """Return a configuration with another width; head width and the ratio of the feed-forward stay."""
    model = config.model
    heads = max(2, 2 * round(width / model.head_dim / 2))
    d_ff = round(width * model.d_ff / model.d_model / 64) * 64 or 64
    kv_heads = max(1, heads // 2)
    changed = dataclasses.replace(model, d_model=width, num_heads=heads, num_kv_heads=kv_heads, d_ff=d_ff)
    return dataclasses.replace(config, model=changed)

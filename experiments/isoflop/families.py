"""The models that the comparison compares: four families, their variants, and the sizes that each has at a budget.

Heads are 32 wide, so that widths are multiples of 32 and the smallest budget has five sizes, too.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import models

from mor_jax.config import Config
from mor_jax.sweep.runs import with_overrides

Name = Literal["vanilla", "mor", "grown", "recursive"]
FAMILIES: tuple[Name, ...] = ("vanilla", "mor", "grown", "recursive")
"""The most telling first."""
BUDGETS = {"full": (1e15, 4e15, 1.6e16), "debug": (2e9, 4e9, 8e9)}
"""Exact training FLOPs, by scale."""
CONFIRMATION = {"full": (256, 2.1e16), "debug": (24, 8e9)}
"""Width and budget of the runs at about the paper's tokens for each parameter, by scale."""
Widths = tuple[tuple[int, ...], ...]
"""Five at every budget, ascending: about 5 to 60 tokens for each unique parameter without embedding."""
_DEBUG_WIDTHS: Widths = ((16, 20, 24, 28, 32),) * 3
GROWTH_SHARES = (0.5, 0.7)
"""Of the steps, with one pass: what was tried of grown models."""


@dataclass(frozen=True)
class Variant:
    """One way to build a family: depth, sharing, routing, growth."""

    name: str
    family: Name
    full_widths: Widths
    layers: int = 8
    changes: Mapping[str, Any] = field(default_factory=dict)

    def widths(self, scale: str) -> Widths:
        """Return the five widths of every budget."""
        return self.full_widths if scale == "full" else _DEBUG_WIDTHS


def _passes(count: int) -> dict[str, Any]:
    return {"model.recursion.sharing": "middle_cycle", "model.recursion.num_recursions": count}


_MOR_2: Widths = ((128, 160, 192, 224, 256), (192, 224, 256, 320, 384), (288, 320, 384, 448, 512))
_MOR_3: Widths = ((128, 160, 192, 224, 288), (192, 224, 288, 352, 416), (288, 352, 416, 512, 576))
_VANILLA = (
    Variant("vanilla-l8", "vanilla", ((96, 128, 160, 192, 224), (160, 192, 224, 256, 320), (224, 256, 320, 384, 448))),
    Variant(
        "vanilla-l4", "vanilla", ((160, 192, 224, 256, 288), (224, 288, 320, 384, 448), (320, 384, 448, 512, 640)), 4
    ),
    Variant(
        "vanilla-l6", "vanilla", ((128, 160, 192, 224, 256), (192, 224, 256, 288, 352), (256, 320, 384, 448, 512)), 6
    ),
    Variant(
        "vanilla-l12", "vanilla", ((64, 96, 128, 160, 192), (128, 160, 192, 224, 256), (192, 224, 256, 320, 384)), 12
    ),
)
"""The unrolled layers of the others; MoR's unique layers (N_r = 3), each once; between the two; deeper."""
_MOR = tuple(
    Variant(
        f"mor-r{count}",
        "mor",
        widths,
        changes={
            **models.OVERRIDES["mor"],
            **_passes(count),
            "model.routing.capacities": list(models.KEPT_CAPACITIES[:count]),
        },
    )
    for count, widths in ((3, _MOR_3), (2, _MOR_2))
)
_RECURSIVE = Variant(
    "recursive-r3",
    "recursive",
    ((128, 160, 192, 224, 256), (192, 224, 256, 320, 384), (288, 352, 384, 448, 512)),
    changes=_passes(3),
)


def _grown(mor: Variant) -> tuple[Variant, ...]:
    """What starts with one pass and is then a variant of MoR."""
    return tuple(
        dataclasses.replace(
            mor,
            name=f"{mor.name.replace('mor', 'grown')}-{share:g}",
            family="grown",
            changes={**mor.changes, "train.growth": [{"share": share, "num_recursions": 1}]},
        )
        for share in GROWTH_SHARES
    )


_GROWN = {mor.name: _grown(mor) for mor in _MOR}
_FIXED: Mapping[Name, tuple[Variant, ...]] = {"vanilla": _VANILLA, "mor": _MOR, "recursive": (_RECURSIVE,)}
_TRIED = (*_VANILLA, *_MOR, *itertools.chain(*_GROWN.values()), _RECURSIVE)
VARIANTS = {variant.name: variant for variant in _TRIED}
CONFIRMED = tuple(VARIANTS[name] for name in ("vanilla-l8", "mor-r3", "mor-r2", "recursive-r3", "vanilla-l4"))
"""Models of the confirmation."""


def variants_of(family: Name, mor: Variant | None = None) -> tuple[Variant, ...]:
    """Return what is tried of a family; of grown models what grows into a variant of MoR, the first if None."""
    return _GROWN[(mor or _MOR[0]).name] if family == "grown" else _FIXED[family]


@dataclass(frozen=True)
class Try:
    """One change of a family's best model: as many for vanilla as for MoR."""

    name: str
    says: str
    changes: Mapping[str, Any]


def tries_of(variant: Variant, width: int) -> tuple[Try, ...]:
    """Return what is tried at a family's best if MoR does not win: four changes each."""
    if variant.family == "vanilla":
        ffn = {"wide-ffn": 4, "narrow-ffn": 2}
        return (
            *(Try(name, f"feed-forward of {k} times the width", {"model.d_ff": k * width}) for name, k in ffn.items()),
            Try("untied", "a head of its own", {"model.tie_embeddings": False}),
            Try("small-batch", "half as many rows a step", {"train.batch_size": 16}),
        )
    count = variant.changes["model.recursion.num_recursions"]
    falling = [*variant.changes.get("train.growth", []), {"share": 0.2, "num_recursions": count}]
    capacities = [1.0, 0.125, 0.0625][:count]
    return (
        Try("falling", "every token takes every pass for a fifth of the steps first", {"train.growth": falling}),
        Try("low-capacity", f"capacities {capacities}", {"model.routing.capacities": capacities}),
        Try("lora-8", "looser tying: LoRA of rank 8 for every pass", {"model.recursion.relaxation.lora_rank": 8}),
        Try("own-norms", "looser tying: norms of its own for every pass", {"model.recursion.share_norms": False}),
    )


def configured(
    scale: str, variant: Variant, width: int, budget: float, changes: Mapping[str, Any], corpus: str
) -> Config:
    """Return a variant at a width with some fields changed, and as many steps as spend the budget.

    The recipe of a family without a router is that of MoR less what concerns routing; a vanilla model has its own.
    """
    recipe = models.RECIPE["vanilla" if variant.family == "vanilla" else "mor"]
    if variant.family == "recursive":
        recipe = {path: value for path, value in recipe.items() if not path.startswith("model.routing.")}
    plain = models.shaped(scale, width, corpus, layers=variant.layers, head_dim=32)
    config = with_overrides(plain, {**variant.changes, **recipe, **changes})
    return models.spending(config, budget)

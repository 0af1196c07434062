"""Named configurations: the rows of the paper's tables 3, 6 and 9, and two that fit a laptop.

Names are ``{vanilla|recursive|mor}-{135m|360m|730m|1.7b}[-expert|-token][-r2|-r3|-r4][-share]``. The paper publishes
steps, schedule and learning rate for 360M only. Elsewhere the steps follow from its budget of 16.5e18 forward FLOPs and
its formula, and the learning rate is this project's default (``LEARNING_RATES``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mor_jax.config import (
    Config,
    DataConfig,
    GrowthStage,
    ModelConfig,
    OptimizerConfig,
    PerfConfig,
    RecursionConfig,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.errors import UserError, suggest
from mor_jax.model.flops import paper_flops_per_token

BUDGET = 16.5e18
"""Forward FLOPs of the paper's main comparison (table 3)."""
BRANCH_BUDGETS = (2e18, 5e18)
"""Smaller budgets of table 9, branched off the stable phase of the same run."""
TABLE_3_STEPS = 9438
"""Steps of 1024 x 2048 tokens that make 20B tokens: table 3's comparison at equal tokens."""
LEARNING_RATES = {"135m": 3e-3, "360m": 3e-3, "730m": 2e-3, "1.7b": 1e-3}
"""360M is the paper's; the others are ours, lower for wider models."""
RELEASED_STEPS = {
    "vanilla-360m": 9438,
    "recursive-360m-r2": 9438,
    "recursive-360m-r3": 9438,
    "recursive-360m-r4": 8883,
    "mor-360m-expert-r2": 12619,
    "mor-360m-expert-r3": 14161,
    "mor-360m-expert-r4": 14216,
    "mor-360m-token-r3": 14161,
    "mor-360m-expert-r3-share": 14672,
}
"""Optimiser steps of the released 360M configurations."""

_SIZES: Mapping[str, dict[str, Any]] = {
    "135m": {"num_layers": 30, "d_model": 576, "num_heads": 9, "num_kv_heads": 3, "d_ff": 1536},
    "360m": {"num_layers": 32, "d_model": 960, "num_heads": 15, "num_kv_heads": 5, "d_ff": 2560},
    "730m": {"num_layers": 26, "d_model": 1536, "num_heads": 24, "num_kv_heads": 8, "d_ff": 4096},
    "1.7b": {"num_layers": 24, "d_model": 2048, "num_heads": 32, "num_kv_heads": 32, "d_ff": 8192},
}
_RELEASED: Mapping[str, Any] = {"attend_across_documents": True, "rotary_positions": "row"}
"""How the release reads packed rows: as one text."""
_PAPER_LAYERS = {("135m", 3): 32, ("360m", 4): 34}
"""Unrolled layers where the paper chose others than the base model's."""
_EXPERT = RoutingConfig(kind="expert")
_TOKEN = RoutingConfig(kind="token", score="softmax", alpha=1.0)


@dataclass(frozen=True)
class Preset:
    """A configuration and what it stands for."""

    config: Config
    reproduces: str
    """The paper's table and row, or what it is for."""


def names() -> list[str]:
    """Return the names of all presets, the small ones first."""
    return [*_SMALL, *_PAPER]


def get(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        UserError: there is none of that name (the nearest is suggested).
    """
    if name in _SMALL:
        return _SMALL[name]
    if name not in _PAPER:
        raise UserError(f"unknown preset {name!r}{suggest(name, names())} (`mor presets` lists them)")
    return _paper_preset(name)


def budget_steps(model: ModelConfig, budget: float, batch_size: int = 1024) -> int:
    """Return the optimiser steps that spend a budget of forward FLOPs by the paper's count."""
    return round(budget / (paper_flops_per_token(model) * batch_size * model.context_length))


@dataclass(frozen=True)
class _Row:
    """What a paper preset's name says."""

    kind: str
    size: str
    recursions: int
    shares_kv: bool


def _rows() -> dict[str, _Row]:
    rows = {}
    for size in _SIZES:
        rows[f"vanilla-{size}"] = _Row("vanilla", size, 1, False)
        for kind, infix in (("recursive", ""), ("expert", "-expert"), ("token", "-token")):
            for recursions in (2, 3, 4):
                for shares_kv in (False, True):
                    family = "recursive" if kind == "recursive" else "mor"
                    name = f"{family}-{size}{infix}-r{recursions}{'-share' if shares_kv else ''}"
                    rows[name] = _Row(kind, size, recursions, shares_kv)
    return rows


_PAPER = _rows()


def _paper_model(row: _Row) -> ModelConfig:
    sizes = {**_SIZES[row.size], **_RELEASED}
    if row.kind == "vanilla":
        return ModelConfig(**sizes)
    sizes = {**sizes, "num_layers": _PAPER_LAYERS.get((row.size, row.recursions), sizes["num_layers"])}
    strategy = "shared" if row.shares_kv else "recursion"
    recursion = RecursionConfig(num_recursions=row.recursions, sharing="middle_cycle", kv_strategy=strategy)
    routing = {"recursive": RoutingConfig(), "expert": _EXPERT, "token": _TOKEN}[row.kind]
    return ModelConfig(**sizes, recursion=recursion, routing=routing)


@cache
def _paper_preset(name: str) -> Preset:
    row = _PAPER[name]
    model = _paper_model(row)
    steps = RELEASED_STEPS.get(name) or budget_steps(model, BUDGET)
    decay_starts = 1 - OptimizerConfig().decay_share
    ends = {budget_steps(model, budget) for budget in BRANCH_BUDGETS} | {TABLE_3_STEPS}
    pinned = sorted({round(decay_starts * end) for end in ends if 0 < end < steps})
    config = Config(
        preset=name,
        model=model,
        data=DataConfig(tokenizer="auto"),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATES[row.size]),
        train=TrainConfig(steps=steps, pinned_steps=tuple(pinned)),
    )
    return Preset(config, _reproduces(name, row))


def _reproduces(name: str, row: _Row) -> str:
    tables = []
    if name in RELEASED_STEPS:
        tables.append("table 3")
        if row.kind == "expert" and row.recursions < 4 and not row.shares_kv:
            tables.append(f"table 3 at 20B tokens with --train.steps {TABLE_3_STEPS}")
    if row.kind != "token" and not row.shares_kv and row.recursions in (1, 3):
        tables.append("table 9")
    if row.kind == "vanilla":
        tables.insert(0, "table 6")
    return ", ".join(tables) or "not in the tables: the same recipe"


_DEMO_MODEL = ModelConfig(
    vocab_size=2048,
    num_layers=8,
    d_model=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    d_ff=352,
    context_length=256,
    attend_across_documents=False,
    dtype="float32",
    recursion=RecursionConfig(num_recursions=3, sharing="middle_cycle"),
    routing=RoutingConfig(kind="expert", residual="plain", alpha=2.0),
)
_DEBUG_MODEL = ModelConfig(
    vocab_size=512,
    num_layers=4,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=128,
    context_length=128,
    attend_across_documents=False,
    dtype="float32",
    recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle"),
    routing=_EXPERT,
)
_SMALL: Mapping[str, Preset] = {
    "demo": Preset(
        Config(
            preset="demo",
            model=_DEMO_MODEL,
            optimizer=OptimizerConfig(kind="muon", learning_rate=6e-3, warmup_steps=20, decay_share=0.4),
            train=TrainConfig(
                steps=800,
                growth=(GrowthStage(share=0.5, num_recursions=1),),
                batch_size=8,
                log_every=10,
                eval_every=200,
                eval_rows=64,
                save_every=200,
                keep=2,
            ),
            perf=PerfConfig(loss_chunk=128),
        ),
        "minutes on a laptop's CPU: what `make train` runs",
    ),
    "debug": Preset(
        Config(
            preset="debug",
            model=_DEBUG_MODEL,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
            train=TrainConfig(steps=40, batch_size=8, log_every=5, eval_every=20, eval_rows=16, save_every=20, keep=2),
            perf=PerfConfig(loss_chunk=64),
        ),
        "seconds: to see that everything works",
    ),
}

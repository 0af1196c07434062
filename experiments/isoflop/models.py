"""Models of the isoFLOP runs: families at several widths, all of one unrolled depth, trained for a budget of FLOPs.

A family at a width differs from another one there in sharing and routing only. The budget counts every product of the
training step, head and backward pass included.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mor_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mor_jax.errors import UserError, suggest
from mor_jax.sweep.isoflop import steps_for, with_steps
from mor_jax.sweep.recipes import quiet
from mor_jax.sweep.recipes import vanilla as vanilla_of
from mor_jax.sweep.runs import with_overrides

Family = Literal["vanilla", "mor"]
FAMILIES: tuple[Family, ...] = ("vanilla", "mor")
OVERRIDES: Mapping[Family, Mapping[str, Any]] = {
    "vanilla": {},
    "mor": {
        "model.recursion.sharing": "middle_cycle",
        "model.recursion.num_recursions": 3,
        "model.routing.kind": "expert",
        "model.routing.residual": "plain",  # seeds of the paper's gate spread by 0.08 at scale `long`
        "model.routing.alpha": 2.0,
    },
}
BASE: Mapping[str, Any] = {"optimizer.kind": "muon"}
"""What the ablation's base has beside the defaults."""
RECIPE: Mapping[Family, Mapping[str, Any]] = {
    "vanilla": {**BASE, "model.parts.qk_norm": True, "model.parts.value_residual": True},
    "mor": {**BASE, "model.parts.qk_norm": True},
}
"""What the ablation kept, by family: the comparison's models (`families.py`) have it, and the ablation's do not."""
KEPT_CAPACITIES = (1.0, 0.25, 0.125)
"""Likewise, of MoR, by pass (measured for N_r = 3; N_r = 2 takes the first two)."""
_WARMUP_SHARE = 0.04


@dataclass(frozen=True)
class Scale:
    """Where and how long the runs are."""

    budget: float
    """Exact training FLOPs of a run."""
    widths: Mapping[Family, tuple[int, int, int]]
    """Sizes, so that the best lies inside: about 5 to 60 tokens for each unique parameter without embedding."""
    rate: float
    """Peak learning rate that is tried first; half and twice it are tried at the middle width."""


SCALES = {
    "full": Scale(4e15, {"vanilla": (192, 256, 320), "mor": (256, 320, 384)}, 2e-3),
    "debug": Scale(4e8, {"vanilla": (16, 24, 32), "mor": (16, 24, 32)}, 3e-3),
}
"""`full` needs a GPU and the corpus of `corpus.py`; `debug` seconds of a CPU, and shows that everything works."""


def scale_of(name: str) -> Scale:
    """Return a scale.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SCALES:
        raise UserError(f"--scale {name!r} is not one of {', '.join(map(repr, SCALES))}{suggest(name, SCALES)}")
    return SCALES[name]


def configured(scale: str, family: Family, width: int, changes: Mapping[str, Any], corpus: str) -> Config:
    """Return a family at a width with some fields changed, and as many steps as spend the budget.

    Args:
        scale: of SCALES.
        family: of FAMILIES.
        width: d_model.
        changes: values by dotted path, on top of the family's and of BASE.
        corpus: prepared corpus of scale `full`.
    """
    config = with_overrides(shaped(scale, width, corpus), {**OVERRIDES[family], **BASE, **changes})
    return spending(config, scale_of(scale).budget)


def spending(config: Config, budget: float) -> Config:
    """Return a configuration with as many steps as spend the budget, and a warm-up of the usual share of them."""
    train = config.train
    steps = steps_for(config.model, budget, train.batch_size, "training", train.growth)
    warmup = max(1, round(_WARMUP_SHARE * steps))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup))
    return with_steps(config, steps)


def shaped(scale: str, width: int, corpus: str, *, layers: int = 8, head_dim: int = 64) -> Config:
    """Return the plain model of a shape; at scale `debug` heads are 8 wide.

    Args:
        scale: of SCALES.
        width: d_model.
        corpus: prepared corpus of scale `full`.
        layers: unrolled depth.
        head_dim: divides the width.
    """
    if scale == "debug":
        config = vanilla_of("debug")
        model = dataclasses.replace(config.model, num_layers=layers, d_model=width, attend_across_documents=False)
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
        return dataclasses.replace(config, model=model, optimizer=optimizer)
    model = ModelConfig(
        vocab_size=8192,
        num_layers=layers,
        d_model=width,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        d_ff=head_dim * round(width * 8 / 3 / head_dim),
        context_length=1024,
        attend_across_documents=False,
    )
    return Config(
        preset="isoflop",
        model=model,
        data=DataConfig(source=corpus),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=quiet(TrainConfig(batch_size=32, eval_rows=512, log_every=100)),
    )

"""The models that are compared, at three scales: what repeats a block, what has all its layers of its own, what routes.

A recursive model is a block of L layers that it applies N_r times (`cycle`), and no layer beside it: three layers,
each used once, follow eight hops. At the same steps the vanilla model of L layers has the parameters of all
recursive ones, and the vanilla model of L N_r layers has the FLOPs of the one with N_r passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawn import drawn_flops
from rows import PREFIX
from tasks import WORDS, task_of

from mor_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, PerfConfig, TrainConfig
from mor_jax.config.model import Dtype
from mor_jax.config.training import OptimizerKind
from mor_jax.errors import UserError, suggest
from mor_jax.model.flops import run_flops
from mor_jax.sweep.isoflop import with_steps
from mor_jax.sweep.recipes import at_flops_of, quiet
from mor_jax.sweep.runs import with_overrides

VOCABULARY = -(-len(WORDS) // 32) * 32
DRAWN = "reasoning-drawn"
"""Preset of the models whose number of passes is drawn for every training step (`drawn.py`)."""
_ROUTED: Mapping[str, Mapping[str, Any]] = {
    "expert": {"kind": "expert", "residual": "plain", "alpha": 2.0},
    "token": {"kind": "token", "score": "softmax", "alpha": 1.0, "residual": "plain"},
    "grown": {"kind": "expert", "residual": "plain", "alpha": 2.0},
}
FAMILIES = ("shallow", "deep", "recursive", "drawn", *_ROUTED)
"""`shallow` and `deep` are vanilla, of L and L N_r layers; `drawn` is recursive, with passes drawn per step;
`grown` is `expert` with a single pass for the first half of its steps."""


@dataclass(frozen=True)
class Scale:
    """Where and how long the runs are."""

    widths: Mapping[str, int]
    """d_model by task."""
    block: int
    """L: layers of the shared block."""
    recursions: tuple[int, ...]
    """N_r, the one that all families are compared at first."""
    steps: int
    """Of every model; at equal FLOPs, of the deep one."""
    batch_size: int
    rate: float
    head_dim: int
    measured_rows: int
    """Held-out rows of every measurement."""
    dtype: Dtype = "bfloat16"
    optimizer: OptimizerKind = "muon"


SCALES = {
    "full": Scale(
        {"pointer-8": 128, "s3-32": 128, "addition-20": 256, "s5-32": 256},
        block=1,
        recursions=(4, 2, 6, 3, 5),
        steps=3000,
        batch_size=256,
        rate=2e-3,
        head_dim=32,
        measured_rows=2048,
    ),
    "notebook": Scale(
        {"s3-8": 48},
        block=1,
        recursions=(3,),
        steps=500,
        batch_size=64,
        rate=4e-3,
        head_dim=16,
        measured_rows=512,
        dtype="float32",
        optimizer="adamw",
    ),
    "debug": Scale(
        {"pointer-2": 16, "s3-4": 16},
        block=1,
        recursions=(2,),
        steps=6,
        batch_size=8,
        rate=3e-3,
        head_dim=8,
        measured_rows=64,
        dtype="float32",
    ),
}
"""`full` needs a GPU; `notebook` is minutes of a CPU; `debug` seconds, and shows that everything works."""


def scale_of(name: str) -> Scale:
    """Return a scale.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SCALES:
        raise UserError(f"--scale {name!r} is not one of {', '.join(map(repr, SCALES))}{suggest(name, SCALES)}")
    return SCALES[name]


def configured(scale: Scale, task: str, family: str, recursions: int, *, equal_flops: bool = False) -> Config:
    """Return a model of a family for a task.

    Args:
        scale: of ``scale_of``.
        task: of the scale's.
        family: of FAMILIES.
        recursions: N_r; what the deep model is as deep as, and of no effect on the shallow one.
        equal_flops: whether it trains for the exact FLOPs of the deep model, or for as many steps.
    """
    base = _vanilla(scale, task, scale.block * (1 if family == "shallow" else recursions))
    overrides: dict[str, Any] = {}
    if family not in ("shallow", "deep"):
        overrides = {
            "model.recursion.sharing": "cycle",
            "model.recursion.num_recursions": recursions,
            **{f"model.routing.{field}": value for field, value in _ROUTED.get(family, {}).items()},
        }
    if family == "drawn":
        overrides["preset"] = DRAWN
    if family == "grown":
        overrides["train.growth"] = [{"share": 0.5, "num_recursions": 1}]
    config = with_overrides(base, overrides)
    if not equal_flops:
        return config
    deep = configured(scale, task, "deep", recursions)
    if family == "drawn":
        return with_steps(config, round(config.train.steps * run_flops(deep) / drawn_flops(config)))
    return at_flops_of(config, deep)


def _vanilla(scale: Scale, task: str, layers: int) -> Config:
    width = scale.widths[task]
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=layers,
        d_model=width,
        num_heads=width // scale.head_dim,
        num_kv_heads=width // scale.head_dim,
        head_dim=scale.head_dim,
        d_ff=64 * max(1, round(width / 24)),
        context_length=task_of(task).row_length,
        init_std=0.02 if width > 64 else 0.04,
        attend_across_documents=False,
        dtype=scale.dtype,
    )
    return Config(
        preset="reasoning",
        model=model,
        data=DataConfig(source=PREFIX + task),
        optimizer=OptimizerConfig(
            kind=scale.optimizer, learning_rate=scale.rate, warmup_steps=max(1, scale.steps // 25)
        ),
        train=quiet(
            TrainConfig(
                steps=scale.steps,
                batch_size=scale.batch_size,
                eval_rows=scale.batch_size,
                log_every=max(1, scale.steps // 20),
            )
        ),
        perf=PerfConfig(attention_backend="xla"),  # rows of 64 tokens
    )

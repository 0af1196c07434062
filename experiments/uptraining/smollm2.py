"""Uptraining from a real checkpoint: N_r = 2 models made from SmolLM2-135M, and the same model from nothing.

The checkpoint is the folder SOURCE that experiments/smollm2/import_gguf.py writes, the text is CORPUS with its
tokenizer (README.md has the commands).
"""

import dataclasses
from typing import Any, get_args

from mor_jax import presets
from mor_jax.config import Config, DataConfig, InitConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.errors import require
from mor_jax.model.sharing import Strategy
from mor_jax.sweep.recipes import quiet, seeded
from mor_jax.sweep.runs import SweepRun

SOURCE = "smollm2"
"""A Hugging Face folder."""
CORPUS = "data/smollm2"
"""Prepared with the checkpoint's tokenizer in rows of 2,048 tokens."""
_STEPS = 400
"""Of 16 rows: 13M tokens."""
_FULL, _MADE, _FRESH = 1e-4, 1e-3, 3e-3
"""Learning rates: of a trained model that only goes on; of one whose layers were replaced; of one from nothing."""


def _config(learning_rate: float, source: InitConfig, **model: Any) -> Config:
    config = presets.get("vanilla-135m").config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, rope_theta=1e5, attend_across_documents=False, **model),
        data=DataConfig(source=CORPUS),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate, warmup_steps=40),
        train=quiet(TrainConfig(steps=_STEPS, batch_size=16, eval_rows=128, log_every=20)),
        init=source,
    )


def runs(scale: str) -> list[SweepRun]:
    """Return the full model going on, what is made of it by every strategy, and one from nothing.

    Raises:
        UserError: a scale; there is one size only.
    """
    require(not scale, f"--scale {scale!r}: this sweep has the checkpoint's size only")
    shared = {"recursion": RecursionConfig(num_recursions=2, sharing="middle_cycle")}
    made = [
        run
        for strategy in get_args(Strategy)
        for run in seeded(f"recursive-{strategy}", _config(_MADE, InitConfig(SOURCE, strategy), **shared))
    ]
    routed = _config(_MADE, InitConfig(SOURCE, "stepwise"), routing=RoutingConfig(kind="expert"), **shared)
    return [
        *seeded("vanilla", _config(_FULL, InitConfig(SOURCE))),
        *made,
        *seeded("expert-stepwise", routed),
        *seeded("recursive-fresh", _config(_FRESH, InitConfig(), **shared)),
    ]

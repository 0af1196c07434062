"""The models that the experiments compare, at the sizes that a CPU and a single GPU afford.

Every model of a scale has the same width, unrolled depth, data, batch and schedule; it differs in sharing and routing
only. A comparison is made at equal tokens (the same steps) or at equal training FLOPs (``at_flops_of``), counted
exactly: head and backward pass included. That is stricter towards routing than the paper's count, which leaves the head
out and thereby lets the shorter passes buy more tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mor_jax import presets
from mor_jax.config import (
    Config,
    DataConfig,
    KvStrategy,
    ModelConfig,
    OptimizerConfig,
    PerfConfig,
    RecursionConfig,
    RoutingConfig,
    Sharing,
    TrainConfig,
)
from mor_jax.errors import UserError, suggest
from mor_jax.model.flops import run_flops
from mor_jax.sweep.isoflop import steps_for, with_steps
from mor_jax.sweep.runs import SweepRun

CORPUS = "data/small"
"""Where the scales `small` and up expect their corpus: 8k BPE, rows of 512 tokens (experiments/README.md)."""
LARGE_CORPUS = "data/large"
"""Where the scale `large` expects its corpus: 8k BPE, rows of 1,024 tokens."""
MINI_CORPUS = "data/mini"
"""Where the scale `mini` expects its corpus: 2k BPE, rows of 256 tokens."""


def _debug() -> Config:
    config = presets.get("debug").config
    model = dataclasses.replace(config.model, num_layers=8, d_model=32, d_ff=64, head_dim=8, context_length=64)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, recursion=RecursionConfig(), routing=RoutingConfig()),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=2),
        train=quiet(TrainConfig(steps=10, batch_size=8, eval_rows=8, log_every=5)),
        perf=PerfConfig(loss_chunk=64),
    )


def _mini() -> Config:
    model = ModelConfig(
        vocab_size=2048,
        num_layers=8,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=176,
        context_length=256,
        init_std=0.04,
        dtype="float32",
    )
    return Config(
        preset="mini",
        model=model,
        data=DataConfig(source=MINI_CORPUS),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=30),
        train=quiet(TrainConfig(steps=300, batch_size=4, eval_rows=128, log_every=50)),
    )


def _small() -> Config:
    model = ModelConfig(
        vocab_size=8192, num_layers=14, d_model=256, num_heads=4, num_kv_heads=2, d_ff=704, context_length=512
    )
    return Config(
        preset="small",
        model=model,
        data=DataConfig(source=CORPUS),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
        train=quiet(TrainConfig(steps=800, batch_size=64, eval_rows=512, log_every=50)),
        perf=PerfConfig(scan_unroll=1),  # a run lasts under a minute: compiling unrolled layers would take longer
    )


def _long() -> Config:
    model = ModelConfig(
        vocab_size=8192, num_layers=8, d_model=256, num_heads=4, num_kv_heads=2, d_ff=704, context_length=512
    )
    return Config(
        preset="long",
        model=model,
        data=DataConfig(source=CORPUS),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        train=quiet(TrainConfig(steps=3000, batch_size=32, eval_rows=512, log_every=100)),
    )


def _large() -> Config:
    model = ModelConfig(
        vocab_size=8192, num_layers=8, d_model=768, num_heads=12, num_kv_heads=4, d_ff=2048, context_length=1024
    )
    return Config(
        preset="large",
        model=model,
        data=DataConfig(source=LARGE_CORPUS),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=150),
        train=quiet(TrainConfig(steps=2400, batch_size=32, eval_rows=256, log_every=100)),
    )


def quiet(train: TrainConfig) -> TrainConfig:
    """One validation and one checkpoint at the end, nothing else."""
    return dataclasses.replace(train, eval_every=0, save_every=0, keep=1, trackers=(), pictures=False)


_SCALES: Mapping[str, Callable[[], Config]] = {
    "debug": _debug,
    "mini": _mini,
    "small": _small,
    "long": _long,
    "large": _large,
}
SCALES = tuple(_SCALES)
"""`debug` runs in seconds on a CPU and shows that everything works. `mini` is for one CPU core and real text: 0.37M
parameters without embedding in 8 layers, 0.3M tokens, minutes a run. The others are for one GPU and real text: `small`
has 10M parameters without embedding in 14 layers and 26M tokens for the vanilla model; `long` 5.9M in 8 layers, 49M
tokens and four times the optimiser steps, because runs of `small` end while the loss still falls steeply. `large` has
the depth of `long` and three times its width: 50M parameters without embedding, 79M tokens."""


def vanilla(scale: str) -> Config:
    """Return the vanilla Transformer of a scale; like every model of one, it masks documents.

    Raises:
        UserError: there is no such scale.
    """
    if scale not in _SCALES:
        raise UserError(f"--scale {scale!r} is not one of {', '.join(map(repr, SCALES))}{suggest(scale, SCALES)}")
    return _with_model(_SCALES[scale](), attend_across_documents=False)


def recursive(
    scale: str, recursions: int, *, sharing: Sharing = "middle_cycle", kv: KvStrategy = "recursion"
) -> Config:
    """Return the recursive Transformer of a scale: shared layers, no router."""
    return _with_model(
        vanilla(scale),
        recursion=RecursionConfig(num_recursions=recursions, sharing=sharing, kv_strategy=kv),
    )


def expert(scale: str, recursions: int, *, kv: KvStrategy = "recursion", **routing: Any) -> Config:
    """Return the expert-choice model of a scale; ``routing`` replaces fields of ``RoutingConfig``."""
    config = recursive(scale, recursions, kv=kv)
    return _with_model(config, routing=RoutingConfig(kind="expert", **routing))


def token(scale: str, recursions: int, *, kv: KvStrategy = "recursion", **routing: Any) -> Config:
    """Return the token-choice model of a scale; ``routing`` replaces fields of ``RoutingConfig``."""
    config = recursive(scale, recursions, kv=kv)
    fields: dict[str, Any] = {"score": "softmax", "alpha": 1.0, **routing}
    return _with_model(config, routing=RoutingConfig(kind="token", **fields))


def _with_model(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def at_flops_of(config: Config, reference: Config) -> Config:
    """Return a configuration that trains for as many exact training FLOPs as ``reference`` does."""
    train = config.train
    return with_steps(config, steps_for(config.model, run_flops(reference), train.batch_size, "training", train.growth))


def seeded(name: str, config: Config, seeds: Sequence[int] = (0,)) -> list[SweepRun]:
    """Return a run per seed, all of the group ``name``."""
    return [
        SweepRun(
            f"{name}-s{seed}",
            dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, seed=seed),
                data=dataclasses.replace(config.data, seed=seed),
            ),
            group=name,
        )
        for seed in seeds
    ]

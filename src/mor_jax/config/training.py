"""Data, optimiser, loop and initial weights of a run, and the root that a run saves beside its checkpoints."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mor_jax.config.checks import require_choice, require_not_negative, require_positive, require_seed
from mor_jax.config.execution import MeshConfig, PerfConfig
from mor_jax.config.growth import GrowthFlag, Stage, plan_stages
from mor_jax.config.model import ModelConfig
from mor_jax.errors import require

Tracker = Literal["tensorboard", "wandb", "trackio"]
OptimizerKind = Literal["adamw", "muon"]
InitStrategy = Literal["stepwise", "average", "lower", "upper", "random"]
Packing = Literal["concat", "best_fit"]
"""How documents fill the rows of a prepared corpus."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: a prepared corpus, a weighted mixture of several, TFDS, or the embedded default."""

    source: str = "embedded"
    """`embedded` (Python's own reference prose), `docs` (adds the docstrings of numpy, scipy and jax), `tfds:NAME`, or
    the folder of a prepared corpus (`gs://` too); several joined by commas form a mixture. `builtin:docs` and
    `./docs` say which of the two is meant where a folder has the name."""
    weights: tuple[float, ...] | None = None
    """Weights of a mixture, one per source; None weighs by rows."""
    tokenizer: str = "auto"
    """For `embedded`, `docs` and `tfds:`: `bytes`, `bpe:SIZE` (trained on the spot), a tokenizer.json, or `auto` =
    bpe:vocab_size."""
    cache: str = "data"
    """Local folder that embedded and TFDS corpora are prepared into, and those in a bucket copied to (once)."""
    seed: int = 0
    """Seed of the shuffle."""
    workers: int = 0
    """Grain worker processes; 0 reads in the trainer's process. The order does not depend on it."""

    def __post_init__(self) -> None:
        require(bool(self.source), "data.source='' must name a source")
        require_not_negative(workers=self.workers)
        require_seed("data.seed", self.seed)
        count = len(self.source.split(","))  # at most: a comma may belong to a path, which the disk shows later
        require(
            len(self.weights or ()) <= count,
            f"data.weights={self.weights} has more entries than the {count} sources",
        )
        for weight in self.weights or ():
            require(weight > 0 and math.isfinite(weight), f"data.weights={self.weights}: {weight} must be positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (paper appendix B) or Muon, with decay mask and clipping."""

    kind: OptimizerKind = "adamw"
    """`muon` orthogonalises the momentum of the layers' matrices, one by one; everything else stays AdamW's. Its
    updates are as large as AdamW's, so that learning rate and weight decay mean the same."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: warm-up, stable, linear decay to 0; `cosine`: warm-up, then cosine to min_ratio."""
    warmup_steps: int = 57
    """Optimiser steps of linear warm-up."""
    decay_share: float = 0.2
    """wsd: share of the steps that decay."""
    min_ratio: float = 0.1
    """cosine: final learning rate over the peak."""
    beta1: float = 0.9
    """AdamW's, as beta2 and epsilon are: Muon's momentum is 0.95."""
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of norms, biases)."""
    clip_norm: float = 1.0
    """Global gradient norm; 0 is off."""
    aux_router_ratio: float = 10.0
    """Learning rate of an auxiliary router over the model's."""

    def __post_init__(self) -> None:
        require_choice("optimizer.kind", self.kind, OptimizerKind)
        require_choice("optimizer.schedule", self.schedule, Literal["wsd", "cosine"])
        require_positive(learning_rate=self.learning_rate, epsilon=self.epsilon, aux_router_ratio=self.aux_router_ratio)
        require_not_negative(warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, clip_norm=self.clip_norm)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} is outside [0, 1)")
        for name in ("decay_share", "min_ratio"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)} is outside [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, evaluation, checkpoints and reporting of a run."""

    steps: int = 14161
    """Optimiser steps."""
    batch_size: int = 1024
    """Rows of context_length tokens per optimiser step, over all devices."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    seed: int = 0
    """Seed of initialisation and random routing."""
    logit_z_loss: float = 0.0
    """Weight of the z-loss on the output logits."""
    growth: tuple[GrowthFlag, ...] = ()
    """Stages before the whole model, each a share of the steps with so many passes, such as `0.5:1 0.2:3`: half of
    the steps with one pass, a fifth with three, and without a router; the rest trains the model as configured."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between validation losses; 0 is only at the end."""
    eval_rows: int = 64
    """Rows of held-out text per validation loss."""
    save_every: int = 500
    """Steps between checkpoints; 0 is only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    pinned_steps: tuple[int, ...] = ()
    """Steps saved and never deleted (isoFLOP branches)."""
    runs: str = "runs"
    """Folder of run folders, local or `gs://`; with several hosts one that all share."""
    name: str = ""
    """Run folder's name; empty is the preset's."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: any of `tensorboard`, `wandb`, `trackio`; empty is nowhere."""
    watchdog_seconds: float = 1800.0
    """Seconds that a step, a compilation or a save may take before all stacks are dumped to stderr; 0 is off."""
    pictures: bool = True
    """Draw loss.png, depth.png and routing.html after the last step (`mor inspect` can do so later)."""

    def __post_init__(self) -> None:
        require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            log_every=self.log_every,
            eval_rows=self.eval_rows,
            keep=self.keep,
        )
        require_not_negative(eval_every=self.eval_every, save_every=self.save_every, logit_z_loss=self.logit_z_loss)
        require_not_negative(watchdog_seconds=self.watchdog_seconds)
        require_seed("train.seed", self.seed)
        plain = not {"/", "\\"} & set(self.name) and self.name not in (".", "..")
        require(plain, f"train.name={self.name!r} is the name of a folder in train.runs, not a path")
        for tracker in self.trackers:
            require_choice("train.trackers", tracker, Tracker)
        require(len(set(self.trackers)) == len(self.trackers), f"train.trackers={self.trackers} names one twice")
        require(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size={self.batch_size} is not divisible by train.accumulation={self.accumulation}",
        )

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Return JSON values of any age as today's: `tensorboard` was a flag, and is now one of `trackers`."""
        old = isinstance(values.get("tensorboard"), bool) and isinstance(values.get("trackers", []), list)
        if not old:  # today's, or what is refused by name
            return values
        others = [name for name in values.get("trackers", ()) if name != "tensorboard"]
        kept = {name: value for name, value in values.items() if name != "tensorboard"}
        return {**kept, "trackers": ["tensorboard", *others] if values["tensorboard"] else others}


@dataclass(frozen=True)
class InitConfig:
    """Where a run's first weights come from (paper section 4.2, table 12: uptraining)."""

    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Folder of a full model to start from (a run, converted weights, or a Hugging Face folder); empty is at random."""
    strategy: InitStrategy = "stepwise"
    """Which of its layers the shared block takes: spread over the depth, their mean, the first, the last, at random."""

    def __post_init__(self) -> None:
        require_choice("init.strategy", self.strategy, InitStrategy)


@dataclass(frozen=True)
class Config:
    """Everything a run needs; saved as config.json beside its checkpoints."""

    preset: str = "debug"
    """Name of the preset that this configuration started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    perf: PerfConfig = field(default_factory=PerfConfig)

    def __post_init__(self) -> None:
        routed_from = self.stages[0].routed_from
        routing_steps = self.train.steps - routed_from
        routing = self.model.routing
        for name, steps, most in (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps, self.train.steps),
            ("model.routing.capacity_warmup_steps", routing.capacity_warmup_steps, routing_steps),
            ("model.routing.gate_warmup_steps", routing.gate_warmup_steps, routing_steps),
            ("model.routing.balance_warmup_steps", routing.balance_warmup_steps, routing_steps),
        ):
            left = f", of which train.growth leaves {most} to routing" if most < self.train.steps else ""
            require(steps <= most, f"{name}={steps} exceeds train.steps={self.train.steps}{left}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained when: the stages of ``train.growth``, and last the model as configured."""
        return plan_stages(self.model, self.train.growth, self.train.steps)

    def stage_after(self, step: int) -> Stage:
        """Return the stage that the ``step``-th optimiser step, counted from 1, belongs to (before it, the first)."""
        return next((stage for stage in self.stages if step <= stage.end), self.stages[-1])

    def of_stage(self, stage: Stage) -> "Config":
        """Return the configuration of a run that trains a stage's model throughout."""
        return dataclasses.replace(self, model=stage.model, train=dataclasses.replace(self.train, growth=()))

"""Frozen configuration dataclasses with cross-field checks (paper sections 2 and 3, tables 3, 6 and 13 to 15).

``Config`` is the root that a run saves beside its checkpoints. ``ModelConfig`` holds everything that changes what the
model computes; ``PerfConfig`` only how it is executed, so it may differ between training and restoring.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from mor_jax.errors import UserError, require

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KvStrategy = Literal["recursion", "shared", "shared_update"]
RoutingKind = Literal["none", "expert", "token"]
RouterKind = Literal["linear", "mlp", "wide_mlp"]
ScoreFunction = Literal["sigmoid", "tanh", "softmax", "none"]
Gating = Literal["weighted", "additive"]
GateResidual = Literal["paper", "plain"]
Sampling = Literal["aux_loss", "aux_router", "none"]
Balancing = Literal["loss", "loss_free", "none"]
Dtype = Literal["float32", "bfloat16"]
Execution = Literal["gather", "scan"]
Remat = Literal["auto", "none", "full", "dots", "names"]
InitStrategy = Literal["stepwise", "average", "lower", "upper", "random"]
LoraTarget = Literal["query", "key_value", "output", "gate_up", "down"]
AttentionBackend = Literal["auto", "xla", "cudnn", "triton", "tokamax", "splash"]
Fusion = Literal["auto", "xla", "triton"]
LogitsDtype = Literal["auto", "float32", "bfloat16"]


def _require_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{name}={value} must be positive")


def _require_not_negative(**values: float) -> None:
    for name, value in values.items():
        require(value >= 0, f"{name}={value} must not be negative")


@dataclass(frozen=True)
class RelaxationConfig:
    """How recursions may differ although they share the block's weights (paper table 16); all off by default."""

    lora_rank: int = 0
    """Rank of a low-rank update of its own for every recursion and layer; 0 is off."""
    lora_targets: tuple[LoraTarget, ...] = ("query", "key_value", "output", "gate_up", "down")
    """Weights that get one."""
    lora_scale: float = 1.0
    """Factor on the update (alpha over rank)."""
    encoding: bool = False
    """Multiply the block's output by a learned vector of its own in every recursion (recursion encoding)."""

    def __post_init__(self) -> None:
        _require_not_negative(lora_rank=self.lora_rank)
        _require_positive(lora_scale=self.lora_scale)
        require(
            self.lora_rank == 0 or bool(self.lora_targets),
            f"lora_rank={self.lora_rank} needs lora_targets",
        )
        for target in self.lora_targets:
            _require_choice("relaxation.lora_targets", target, LoraTarget)


@dataclass(frozen=True)
class RecursionConfig:
    """Which unrolled layer uses which unique layer (paper section 2.1, table 10)."""

    num_recursions: int = 1
    """N_r: how often the shared block is applied (at most; a router may stop earlier)."""
    sharing: Sharing = "none"
    """Parameter sharing; `none` is the vanilla Transformer and needs num_recursions = 1."""
    share_norms: bool = True
    """Whether the recursions share their RMSNorm scales too (the release's ln_share)."""
    kv_strategy: KvStrategy = "recursion"
    """Keys and values: each recursion its own (`recursion`), recursion 1's for all (`shared`), or recursion 1's with
    the rows of the selected tokens replaced (`shared_update`)."""
    base_depth: int | None = None
    """Layers in the shared block; None takes the released rounding of num_layers."""
    relaxation: RelaxationConfig = field(default_factory=RelaxationConfig)

    def __post_init__(self) -> None:
        _require_choice("sharing", self.sharing, Sharing)
        _require_choice("kv_strategy", self.kv_strategy, KvStrategy)
        _require_positive(num_recursions=self.num_recursions)
        require(self.base_depth is None or self.base_depth > 0, f"base_depth={self.base_depth} must be positive")
        require(
            self.sharing != "none" or self.num_recursions == 1,
            f"num_recursions={self.num_recursions} needs a parameter sharing, but sharing='none'",
        )
        require(
            self.sharing != "none" or self.kv_strategy == "recursion",
            f"kv_strategy={self.kv_strategy!r} needs a parameter sharing, but sharing='none'",
        )
        require(
            "sequence" not in self.sharing or self.kv_strategy != "shared_update",
            f"kv_strategy='shared_update' replaces the rows of selected tokens between passes of a whole block; "
            f"sharing={self.sharing!r} has no such pass (use 'cycle' or 'middle_cycle')",
        )

        relaxed = self.relaxation.lora_rank > 0 or self.relaxation.encoding
        require(not relaxed or self.sharing != "none", "relaxation needs a parameter sharing, but sharing='none'")
        require(
            not self.relaxation.encoding or not self.is_sequence,
            f"relaxation.encoding=True marks the passes of a whole block, which sharing={self.sharing!r} does not have "
            f"(use 'cycle' or 'middle_cycle')",
        )

    @property
    def has_middle(self) -> bool:
        """Whether the first and the last layer are unique (middle_*)."""
        return self.sharing.startswith("middle_")

    @property
    def repeats_block(self) -> bool:
        """Whether the whole block is applied several times (a sequence repeats every layer in place instead)."""
        return self.num_recursions > 1 and not self.is_sequence

    @property
    def is_sequence(self) -> bool:
        """Whether each layer is repeated in place rather than the whole block."""
        return self.sharing.endswith("sequence")


@dataclass(frozen=True)
class RoutingConfig:
    """The router that gives every token its number of passes (paper section 2.2, tables 13 and 14)."""

    kind: RoutingKind = "none"
    """`expert`: expert-choice (equation 2.1); `token`: token-choice (equation 2.2); `none`: no router, all passes."""
    router: RouterKind = "linear"
    """Router network: linear, mlp (d -> 2d GELU -> out) or wide_mlp (d -> 4d GELU -> out)."""
    router_expansion: int | None = None
    """Hidden width of an MLP router in units of d_model; None is 2 for mlp, 4 for wide_mlp (in the release 2)."""
    score: ScoreFunction = "sigmoid"
    """Function from raw router output to score."""
    alpha: float = 0.1
    """Factor on the score."""
    gating: Gating = "weighted"
    """`weighted` multiplies the block's output by the score; `additive` leaves it out."""
    residual: GateResidual = "paper"
    """`paper`: x + g * block(x), the block's output with its residual path; `plain`: x + g * (block(x) - x)."""
    temperature: float = 1.0
    """Divides the router's input."""
    capacities: tuple[float, ...] | None = None
    """Share of the sequence that recursion r computes; None is N_r/N_r, ..., 1/N_r."""
    capacity_multiple: int = 1
    """Round every k up to a multiple of this many tokens: really selects more, so it belongs to the model."""
    capacity_warmup_steps: int = 0
    """Optimiser steps of cosine warm-up of the capacities from 1.0 (the release counts forward passes); 0 is off."""
    capacity_slack: float = 1.25
    """Token-choice under `gather`: seats per recursion are this times the default capacities (at most the sequence)."""
    sampling: Sampling = "aux_loss"
    """Expert-choice: what learns the causal boundary: a loss on the router itself, a separate router, or nothing."""
    sampling_coefficient: float = 0.001
    """Weight of the auxiliary loss."""
    random: bool = False
    """Expert-choice: select at random (ablation of table 13); gates still come from the router."""
    balancing: Balancing = "loss"
    """Token-choice: balancing loss, loss-free bias, or nothing."""
    balancing_coefficient: float = 0.1
    """Weight of the balancing loss."""
    bias_update_rate: float = 0.001
    """Token-choice, loss_free: step u of the router bias per optimiser step."""
    balance_warmup_steps: int = 0
    """Token-choice: optimiser steps during which every token takes every pass (the release counts forward passes)."""
    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss."""
    boundaries: tuple[float, ...] | None = None
    """Expert-choice, mode `threshold`: raw-score boundary per recursion from calibration; None is 0 for all."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", RoutingKind),
            ("router", RouterKind),
            ("score", ScoreFunction),
            ("gating", Gating),
            ("residual", GateResidual),
            ("sampling", Sampling),
            ("balancing", Balancing),
        ):
            _require_choice(f"routing.{name}", getattr(self, name), choices)
        _require_positive(
            alpha=self.alpha,
            temperature=self.temperature,
            capacity_multiple=self.capacity_multiple,
            capacity_slack=self.capacity_slack,
        )
        _require_not_negative(
            capacity_warmup_steps=self.capacity_warmup_steps,
            balance_warmup_steps=self.balance_warmup_steps,
            sampling_coefficient=self.sampling_coefficient,
            balancing_coefficient=self.balancing_coefficient,
            bias_update_rate=self.bias_update_rate,
            z_loss_coefficient=self.z_loss_coefficient,
        )
        self._check_kind()
        self._check_capacities()

    def _check_kind(self) -> None:
        if self.kind == "expert":
            require(self.score != "softmax", "score='softmax' compares experts; expert-choice has one score per token")
        if self.kind == "token":
            require(
                self.score in ("softmax", "sigmoid"),
                f"score={self.score!r} is not one of 'softmax', 'sigmoid' for token-choice",
            )
            require(not self.random, "random=True is an ablation of expert-choice; token-choice has none")

    def _check_capacities(self) -> None:
        if self.capacities is None:
            return
        for capacity in self.capacities:
            require(0 < capacity <= 1, f"capacities={self.capacities}: {capacity} is outside (0, 1]")
        descending = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        require(
            descending,
            f"capacities={self.capacities} must not ascend: each recursion selects among the tokens of the last",
        )
        if self.kind == "token":
            require(
                self.capacities[0] == 1,
                f"capacities={self.capacities}: token-choice gives every token a first pass: capacities[0] must be 1",
            )


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder (RMSNorm, rotary, grouped-query attention, SwiGLU) with recursion and routing."""

    vocab_size: int = 49152
    """V: entries of the embedding; at least the tokenizer's."""
    num_layers: int = 32
    """Unrolled depth asked for; layers that do not divide are dropped by the released rounding."""
    d_model: int = 960
    """D: width of the residual stream."""
    num_heads: int = 15
    """N: query heads."""
    num_kv_heads: int = 5
    """K: key/value heads; divides num_heads."""
    head_dim: int = 64
    """H: width of one head (even, for rotary embedding)."""
    d_ff: int = 2560
    """F: width of the SwiGLU feed-forward."""
    context_length: int = 2048
    """T: tokens per training row."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of every normal initialiser."""
    tie_embeddings: bool = True
    """Whether the output head is the transposed embedding."""
    attend_across_documents: bool = True
    """Packed rows: whether attention crosses document borders (the release's choice)."""
    dtype: Dtype = "bfloat16"
    """Compute dtype; parameters are float32."""
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        _require_choice("dtype", self.dtype, Dtype)
        _require_positive(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            d_ff=self.d_ff,
            context_length=self.context_length,
            rope_theta=self.rope_theta,
            norm_epsilon=self.norm_epsilon,
            init_std=self.init_std,
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs")
        self._check_layers()
        self._check_routing()

    def _check_layers(self) -> None:
        unique = 2 if self.recursion.has_middle else 0
        needed = unique + self.recursion.num_recursions
        require(
            self.num_layers >= needed,
            f"num_layers={self.num_layers} is too few for sharing={self.recursion.sharing!r} with "
            f"num_recursions={self.recursion.num_recursions}: at least {needed}",
        )
        base = self.recursion.base_depth
        require(
            base is None or unique + base * self.recursion.num_recursions <= self.num_layers,
            f"base_depth={base} x num_recursions={self.recursion.num_recursions} + {unique} exceeds "
            f"num_layers={self.num_layers}",
        )

    def _check_routing(self) -> None:
        routing, recursion = self.routing, self.recursion
        if routing.kind == "none":
            return
        require(
            recursion.sharing in ("cycle", "middle_cycle"),
            f"routing.kind={routing.kind!r} decides between passes of a whole block, which "
            f"sharing={recursion.sharing!r} does not have (use 'cycle' or 'middle_cycle')",
        )
        for name in ("capacities", "boundaries"):
            values = getattr(routing, name)
            require(
                values is None or len(values) == recursion.num_recursions,
                f"routing.{name}={values} has {len(values or ())} entries for "
                f"num_recursions={recursion.num_recursions}",
            )

    @property
    def block_depth(self) -> int:
        """L: unique layers in the shared block (all layers of a vanilla model)."""
        if self.recursion.base_depth is not None:
            return self.recursion.base_depth
        middle = self.num_layers - (2 if self.recursion.has_middle else 0)
        return middle // self.recursion.num_recursions

    @property
    def unrolled_depth(self) -> int:
        """Layers a token passes that takes every recursion."""
        return (2 if self.recursion.has_middle else 0) + self.block_depth * self.recursion.num_recursions

    @property
    def capacities(self) -> tuple[float, ...]:
        """Capacity of every recursion: the routing's own, or N_r/N_r, ..., 1/N_r; all 1 without a router."""
        count = self.recursion.num_recursions
        if self.routing.kind == "none":
            return (1.0,) * count
        if self.routing.capacities is not None:
            return self.routing.capacities
        return tuple((count - r) / count for r in range(count))


@dataclass(frozen=True)
class PerfConfig:
    """How the model is executed; never what it computes (but see `execution`).

    What is left open (`auto`, None) is chosen by device and shape when a train step is compiled, and logged
    (``mor_jax.perf``).
    """

    execution: Execution = "gather"
    """`gather` computes only the selected tokens (static shapes); `scan` is nn.scan with depth masks. They agree,
    except that token-choice under `gather` drops tokens beyond its seats."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel; `auto` chooses by device and mask and logs its choice."""
    remat: Remat = "auto"
    """Rematerialisation of layers in the backward pass: of nothing, of everything (`full`), of all but matrix products
    (`dots`) or but the named tensors that are costly to make (`names`); `auto` the least that fits the memory."""
    scan_unroll: int | None = None
    """Layers unrolled per step of the layer scan; 0 unrolls all; None is all on a GPU, 1 elsewhere."""
    loss_chunk: int | None = None
    """Positions per chunk of the fused cross-entropy; None chooses by device and batch."""
    slot_multiple: int | None = None
    """`gather`: computed lengths are filled up to a multiple of this with slots that hold no selected token, because
    kernels like round lengths; exactly k tokens count in any case. None is 8 on a GPU, 1 elsewhere."""
    logits_dtype: LogitsDtype = "auto"
    """How the loss keeps the logits of a chunk; softmax and sums are float32 in any case. `auto` is bfloat16 for a
    bfloat16 model on a GPU (as the release rounds them), float32 elsewhere."""
    fusion: Fusion = "auto"
    """Norms, SwiGLU and the projections' gradients: as XLA fuses them, or this project's kernels (GPUs, rows whole)."""
    whole_block: bool | None = None
    """Under `fsdp`: gather the shared block's weights once per micro-batch, for all recursions, forward and backward,
    and keep them whole in the compute dtype, rather than gather them at every use; None is yes if they take at most
    a tenth of the memory."""
    compiler_options: tuple[str, ...] | None = None
    """XLA options of the train step as `name=value`; None takes the device's (``mor_jax.perf`` gives the reasons)."""

    def __post_init__(self) -> None:
        _require_choice("perf.execution", self.execution, Execution)
        _require_choice("perf.attention_backend", self.attention_backend, AttentionBackend)
        _require_choice("perf.remat", self.remat, Remat)
        _require_choice("perf.logits_dtype", self.logits_dtype, LogitsDtype)
        _require_choice("perf.fusion", self.fusion, Fusion)
        _require_not_negative(scan_unroll=self.scan_unroll or 0)
        for name in ("loss_chunk", "slot_multiple"):
            value = getattr(self, name)
            require(value is None or value > 0, f"perf.{name}={value} must be positive")
        for option in self.compiler_options or ():
            require("=" in option, f"perf.compiler_options: {option!r} is not of the form name=value")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: a prepared corpus, a weighted mixture of several, TFDS, or the embedded default."""

    source: str = "embedded"
    """`embedded` (Python's own reference prose), `docs` (adds the docstrings of numpy, scipy and jax), `tfds:NAME`, or
    the folder of a prepared corpus (`gs://` too); several joined by commas form a mixture."""
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
        _require_not_negative(workers=self.workers)
        count = len(self.source.split(","))
        require(
            self.weights is None or len(self.weights) == count,
            f"data.weights={self.weights} has not one entry for each of {count} sources",
        )
        for weight in self.weights or ():
            require(weight > 0 and math.isfinite(weight), f"data.weights={self.weights}: {weight} must be positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decay mask and clipping (paper appendix B)."""

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
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of norms, biases)."""
    clip_norm: float = 1.0
    """Global gradient norm; 0 is off."""
    aux_router_ratio: float = 10.0
    """Learning rate of an auxiliary router over the model's."""

    def __post_init__(self) -> None:
        _require_choice("optimizer.schedule", self.schedule, Literal["wsd", "cosine"])
        _require_positive(
            learning_rate=self.learning_rate, epsilon=self.epsilon, aux_router_ratio=self.aux_router_ratio
        )
        _require_not_negative(warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, clip_norm=self.clip_norm)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} is outside [0, 1)")
        for name in ("decay_share", "min_ratio"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)} is outside [0, 1]")


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; data = -1 takes what the others leave."""

    slice: int = 1
    """TPU slices joined by the data-center network: replicas that split the batch."""
    data: int = -1
    """Replicas that split the batch."""
    fsdp: int = 1
    """Shards of parameters and optimiser state (also splits the batch)."""
    context: int = 1
    """Shards of each row's tokens."""
    tensor: int = 1
    """Shards of heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        require(self.data == -1 or self.data > 0, f"mesh.data={self.data} must be positive, or -1 for the rest")
        for name in ("slice", "fsdp", "context", "tensor"):
            size = getattr(self, name)
            require(size > 0, f"mesh.{name}={size} must be positive")


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
    tensorboard: bool = True
    """Write TensorBoard event files."""
    watchdog_seconds: float = 1800.0
    """Seconds that a step, a compilation or a save may take before all stacks are dumped to stderr; 0 is off."""
    pictures: bool = True
    """Draw loss.png, depth.png and routing.html after the last step (`mor inspect` can do so later)."""

    def __post_init__(self) -> None:
        _require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            log_every=self.log_every,
            eval_rows=self.eval_rows,
            keep=self.keep,
        )
        _require_not_negative(eval_every=self.eval_every, save_every=self.save_every, logit_z_loss=self.logit_z_loss)
        _require_not_negative(watchdog_seconds=self.watchdog_seconds)
        require(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size={self.batch_size} is not divisible by train.accumulation={self.accumulation}",
        )


@dataclass(frozen=True)
class InitConfig:
    """Where a run's first weights come from (paper section 4.2, table 12: uptraining)."""

    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Folder of a full model to start from (a run, converted weights, or a Hugging Face folder); empty is at random."""
    strategy: InitStrategy = "stepwise"
    """Which of its layers the shared block takes: spread over the depth, their mean, the first, the last, at random."""

    def __post_init__(self) -> None:
        _require_choice("init.strategy", self.strategy, InitStrategy)


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
        warmups = (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("model.routing.capacity_warmup_steps", self.model.routing.capacity_warmup_steps),
            ("model.routing.balance_warmup_steps", self.model.routing.balance_warmup_steps),
        )
        for name, steps in warmups:
            if steps > self.train.steps:
                raise UserError(f"{name}={steps} exceeds train.steps={self.train.steps}")

"""Which layers share parameters, how recursions differ, and who is routed (paper sections 2.1 and 2.2)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from mor_jax.config.checks import require_choice, require_not_negative, require_positive
from mor_jax.errors import require

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KvStrategy = Literal["recursion", "shared", "shared_update"]
RoutingKind = Literal["none", "expert", "token"]
RouterKind = Literal["linear", "mlp", "wide_mlp"]
ScoreFunction = Literal["sigmoid", "tanh", "softmax", "none"]
Gating = Literal["weighted", "additive"]
GateResidual = Literal["paper", "plain"]
Sampling = Literal["aux_loss", "aux_router", "none"]
Balancing = Literal["loss", "loss_free", "none"]
LoraTarget = Literal["query", "key_value", "output", "gate_up", "down"]
Mode = Literal["topk", "threshold"]
"""How expert-choice selects: `topk` as in training, which looks ahead along the sequence; `threshold` causally."""


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
        require_not_negative(lora_rank=self.lora_rank)
        require_positive(lora_scale=self.lora_scale)
        require(
            self.lora_rank == 0 or bool(self.lora_targets),
            f"lora_rank={self.lora_rank} needs lora_targets",
        )
        for target in self.lora_targets:
            require_choice("relaxation.lora_targets", target, LoraTarget)


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
        require_choice("sharing", self.sharing, Sharing)
        require_choice("kv_strategy", self.kv_strategy, KvStrategy)
        require_positive(num_recursions=self.num_recursions)
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
    gate_warmup_steps: int = 0
    """Optimiser steps in which the gate's effect comes in, linearly, from none at all: at first a pass replaces a
    token's state by the block's output, as without a router; 0 is off."""
    capacity_slack: float = 1.25
    """Token-choice under `gather`: seats per recursion are this times the default capacities (at most the sequence)."""
    sampling: Sampling = "aux_loss"
    """Expert-choice: what learns a causal boundary at 0: a loss on the router itself, a separate router, or nothing."""
    sampling_coefficient: float = 0.001
    """Weight of the auxiliary loss."""
    random: bool = False
    """Expert-choice: uniform random numbers in place of the router's scores, for choosing and, times alpha, as gates
    (ablation of table 13, as released); the router's weights are not used, and no loss trains them."""
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
    """Expert-choice, mode `threshold`: raw-score boundary per recursion from calibration; None takes the running
    ones that training keeps, or else 0 for all."""

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
            require_choice(f"routing.{name}", getattr(self, name), choices)
        require_positive(
            alpha=self.alpha,
            temperature=self.temperature,
            capacity_multiple=self.capacity_multiple,
            capacity_slack=self.capacity_slack,
        )
        require_not_negative(
            capacity_warmup_steps=self.capacity_warmup_steps,
            gate_warmup_steps=self.gate_warmup_steps,
            balance_warmup_steps=self.balance_warmup_steps,
            sampling_coefficient=self.sampling_coefficient,
            balancing_coefficient=self.balancing_coefficient,
            bias_update_rate=self.bias_update_rate,
            z_loss_coefficient=self.z_loss_coefficient,
        )
        self._check_kind()
        self._check_capacities()
        if self.router_expansion is not None:
            require_positive(router_expansion=self.router_expansion)
            rule = f"router_expansion={self.router_expansion} is the hidden width of an MLP"
            require(self.router != "linear", f"{rule}, which router={self.router!r} has none of")
        unknown = self.boundaries is not None and any(math.isnan(boundary) for boundary in self.boundaries)
        require(not unknown, f"boundaries={self.boundaries} must be numbers, not NaN")

    @property
    def is_loss_free(self) -> bool:
        """Whether token-choice is balanced by a bias that is no parameter (``router_bias_R``)."""
        return self.kind == "token" and self.balancing == "loss_free"

    @property
    def keeps_boundaries(self) -> bool:
        """Whether training keeps running boundaries of expert-choice: where the router's own scores select."""
        return self.kind == "expert" and not self.random and self.sampling != "aux_router"

    @property
    def has_aux_router(self) -> bool:
        """Whether a second router learns the causal boundary of expert-choice."""
        return self.kind == "expert" and self.sampling == "aux_router"

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

    @property
    def hidden_expansion(self) -> int:
        """Hidden width of the router network in units of d_model; 0 without a hidden layer."""
        if self.router_expansion is not None:
            return self.router_expansion
        return {"mlp": 2, "wide_mlp": 4}.get(self.router, 0)

"""Everything that changes what the model computes (paper section 3, tables 6 and 13 to 15)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mor_jax.config.checks import require_choice, require_positive
from mor_jax.config.parts import PartsConfig
from mor_jax.config.recursion import RecursionConfig, RoutingConfig
from mor_jax.errors import require

Dtype = Literal["float32", "bfloat16"]
RotaryPositions = Literal["row", "document"]


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
    rotary_positions: RotaryPositions = "row"
    """Packed rows: what rotary positions count, places in the row (as released) or in the document. `document` is what
    older runs were trained with: where attention crosses borders, some visible keys then stand at or after their query.
    Inside masked documents the two differ by rounding only, since rotary attention sees distances."""
    dtype: Dtype = "bfloat16"
    """Compute dtype; parameters are float32."""
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, Dtype)
        require_choice("rotary_positions", self.rotary_positions, RotaryPositions)
        require_positive(
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
        for name in ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "context_length"):
            require(getattr(self, name) < 2**31, f"{name}={getattr(self, name)} is above 2^31 - 1")  # indices are int32
        require(self.num_layers < 2**16, f"num_layers={self.num_layers} is above 65535")  # they are listed by name
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs")
        self._check_layers()
        self._check_routing()
        self.parts.check(self.recursion)

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Return JSON values of any age as today's: before `rotary_positions` was one, positions restarted."""
        return {"rotary_positions": "document", **values}

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

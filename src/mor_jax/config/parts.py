"""Modern parts of a Transformer that are being tried out, all off by default; an ablation keeps or deletes each."""

from dataclasses import dataclass
from typing import Literal

from mor_jax.config.checks import require_choice, require_positive
from mor_jax.config.recursion import RecursionConfig
from mor_jax.errors import require

ResidualScale = Literal["none", "depth", "learned"]


@dataclass(frozen=True)
class PartsConfig:
    """Parts under test; none has been measured yet (docs/concepts.md says what each computes)."""

    qk_norm: bool = False
    """RMSNorm of every head's query and key before rotary embedding; one learned scale [H] each per layer."""
    input_injection: bool = False
    """Add the normalised state before the first pass to the input of every pass, by a learned scale [R, D], 0 at
    first."""
    residual_scale: ResidualScale = "none"
    """Factor on what attention and feed-forward add to the stream: `depth` is 1 / sqrt(N_r L) in every layer, `learned`
    a scale per pass of the block, 1 at first."""
    zero_init: bool = False
    """Start the output projections of attention and feed-forward at zero."""
    logit_softcap: float | None = None
    """Logits are this times tanh(logits / this), in training and out of it; None is off."""
    value_residual: bool = False
    """The block's values are mixed with those of the model's first layer, by a learned share [R, L], 1/2 at first."""
    width_init: int | None = None
    """Width at which the layers' matrices start with `init_std`: at others with init_std * sqrt(this / d_model). 1000
    is sqrt(2 / (5 d_model)), 2500 is 1 / sqrt(d_model) where init_std is 0.02; None is `init_std` at every width."""

    def __post_init__(self) -> None:
        require_choice("parts.residual_scale", self.residual_scale, ResidualScale)
        for name in ("logit_softcap", "width_init"):
            if getattr(self, name) is not None:
                require_positive(**{f"parts.{name}": getattr(self, name)})

    @property
    def changes(self) -> list[str]:
        """Those that change what a trained model computes, not only where training starts, as `name=value`."""
        plain = PartsConfig(zero_init=self.zero_init, width_init=self.width_init)
        return [f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(plain, name)]

    def check(self, recursion: RecursionConfig) -> None:
        """Refuse what the model's recursions give no meaning.

        Raises:
            UserError: naming the part and the rule.
        """
        sharing, strategy = recursion.sharing, recursion.kv_strategy
        require(
            not self.input_injection or (sharing != "none" and not recursion.is_sequence),
            f"parts.input_injection=True adds to the input of every pass of a whole block, which sharing={sharing!r} "
            f"does not have (use 'cycle' or 'middle_cycle')",
        )
        require(
            not self.value_residual or (strategy == "recursion" and not recursion.is_sequence),
            f"parts.value_residual=True mixes the values of every pass of a whole block, but sharing={sharing!r} with "
            f"kv_strategy={strategy!r} has none of its own (use 'recursion', and no sequence)",
        )

"""Modern parts of a Transformer that are being tried out, all off by default; an ablation keeps or deletes each."""

from dataclasses import dataclass
from typing import Any, Literal

from mor_jax.config.checks import require_choice, require_positive
from mor_jax.config.recursion import RecursionConfig
from mor_jax.errors import require

ResidualScale = Literal["none", "learned"]
_DELETED = {"zero_init": False, "width_init": None, "input_injection": False}
"""Parts that the ablation deleted, with the value that means off."""


@dataclass(frozen=True)
class PartsConfig:
    """Parts under test (docs/concepts.md says what each computes, experiments/isoflop what it gains)."""

    qk_norm: bool = False
    """RMSNorm of every head's query and key before rotary embedding; one learned scale [H] each per layer."""
    residual_scale: ResidualScale = "none"
    """Factor on what attention and feed-forward add to the stream: `learned` is a scale per pass of the block, 1 at
    first."""
    logit_softcap: float | None = None
    """Logits are this times tanh(logits / this), in training and out of it; None is off."""
    value_residual: bool = False
    """The block's values are mixed with those of the model's first layer, by a learned share [R, L], 1/2 at first."""

    def __post_init__(self) -> None:
        require_choice("parts.residual_scale", self.residual_scale, ResidualScale)
        if self.logit_softcap is not None:
            require_positive(**{"parts.logit_softcap": self.logit_softcap})

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Leave out parts that older configurations name, if they are off.

        Raises:
            UserError: one of them is on: no code computes it any longer.
        """
        on = [f"{name}={values[name]!r}" for name, off in _DELETED.items() if values.get(name, off) != off]
        if values.get("residual_scale") == "depth":
            on.append("residual_scale='depth'")
        require(not on, f"parts.{', '.join(on)} was deleted after its ablation (experiments/isoflop)")
        return {name: value for name, value in values.items() if name not in _DELETED}

    @property
    def changes(self) -> list[str]:
        """Those that are on, as `name=value`: they change what a trained model computes."""
        plain = PartsConfig()
        return [f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(plain, name)]

    def check(self, recursion: RecursionConfig) -> None:
        """Refuse what the model's recursions give no meaning.

        Raises:
            UserError: naming the part and the rule.
        """
        sharing, strategy = recursion.sharing, recursion.kv_strategy
        require(
            not self.value_residual or (strategy == "recursion" and not recursion.is_sequence),
            f"parts.value_residual=True mixes the values of every pass of a whole block, but sharing={sharing!r} with "
            f"kv_strategy={strategy!r} has none of its own (use 'recursion', and no sequence)",
        )

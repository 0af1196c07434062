"""Modern parts of a Transformer, off by default: those that an ablation kept (experiments/isoflop)."""

from dataclasses import dataclass
from typing import Any

from mor_jax.config.recursion import RecursionConfig
from mor_jax.errors import require

_DELETED = {
    "zero_init": False,
    "width_init": None,
    "input_injection": False,
    "residual_scale": "none",
    "logit_softcap": None,
}
"""Parts that the ablation deleted, with the value that means off."""


@dataclass(frozen=True)
class PartsConfig:
    """Parts that change what a model computes (docs/concepts.md says how, experiments/isoflop what each gains)."""

    qk_norm: bool = False
    """RMSNorm of every head's query and key before rotary embedding; one learned scale [H] each per layer."""
    value_residual: bool = False
    """Every layer's values are mixed with those of the first, by a learned share [1, L], 1/2 at first; for models that
    share no layers: it gained nothing in a shared block."""

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Leave out parts that older configurations name, if they are off.

        Raises:
            UserError: one of them is on: no code computes it any longer.
        """
        on = [f"{name}={values[name]!r}" for name, off in _DELETED.items() if values.get(name, off) != off]
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
        require(
            not self.value_residual or recursion.sharing == "none",
            f"parts.value_residual=True needs recursion.sharing='none', not {recursion.sharing!r}: in a shared block "
            "it gained nothing (experiments/isoflop)",
        )

"""What goes into the engine and what comes out: requests and tokens."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from mor_jax.infer.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """Tokens to generate at most."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    """Tokens each of which ends the completion (and is its last token)."""
    max_depth: int | None = None
    """Budget of passes per token; None is the model's."""


NOT_FINITE = "the logits are not finite: the weights hold NaN or infinity, or the computation overflows"


class Token(NamedTuple):
    """One generated token."""

    request: int
    """Number that ``submit`` gave."""
    token: int
    depth: int
    """Passes completed by the token before it, whose state this one was read from."""
    log_probability: float
    finished: bool
    """Whether it is the request's last."""
    time: float
    """``time.perf_counter`` when the host saw it."""

    @property
    def is_valid(self) -> bool:
        """Whether it was chosen from finite logits: a single NaN or infinity among them reaches the normaliser."""
        return math.isfinite(self.log_probability)

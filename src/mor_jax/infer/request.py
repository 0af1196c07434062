"""What goes into the engine and what comes out: requests and tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mor_jax.infer.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """Tokens to generate at most; 0 only reads the prompt, and gives one token that says so and is to be dropped."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    """Tokens each of which ends the completion (and is its last token)."""
    max_depth: int | None = None
    """Budget of passes per token; None is the model's."""
    min_tokens: int = 0
    """Tokens before which no stop token is chosen."""
    alternatives: int = 0
    """Most likely tokens to tell at every position."""
    score_prompt: bool = False
    """Whether to tell the log-probability of the prompt's tokens."""


NOT_FINITE = "the logits are not finite: the weights hold NaN or infinity, or the computation overflows"


Ranked = tuple[tuple[int, float], ...]
"""Most likely tokens with their log-probabilities, the first one first."""


@dataclass(frozen=True)
class PromptScores:
    """What the model says of a prompt's tokens but the first."""

    log_probabilities: Sequence[float]
    """Of the second token, the third, and so on, each after those before it."""
    alternatives: Sequence[Ranked]
    """Likewise; empty unless asked for."""

    @property
    def is_valid(self) -> bool:
        """Whether they come from finite logits."""
        return all(map(math.isfinite, self.log_probabilities))


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
    alternatives: Ranked = ()
    """As many as the request asks for."""
    prompt: PromptScores | None = None
    """With the first token, if the request asks for it."""
    found: int = 0
    """With the first token: tokens of the prompt whose keys and values were there already."""

    @property
    def is_valid(self) -> bool:
        """Whether it was chosen from finite logits: a single NaN or infinity among them reaches the normaliser."""
        return math.isfinite(self.log_probability) and (self.prompt is None or self.prompt.is_valid)

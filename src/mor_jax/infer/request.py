"""What goes into the engine and what comes out: requests and tokens."""

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

"""What ``mor bench http`` is asked for; needs no numpy, so that the command can parse it at once."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mor_jax.errors import UserError, require

Lengths = Callable[[Random], int]
"""Draws a number of tokens."""

_LONGEST = 1 << 20
_OWN_FIELDS = ("model", "prompt", "max_tokens", "stream", "stream_options")


@dataclass(frozen=True)
class HttpSettings:
    """What a server is measured with."""

    concurrency: tuple[int, ...] = ()
    """Closed loop: requests in flight, a measurement each. With none, and no rates, 8."""
    rates: tuple[float, ...] = ()
    """Open loop: requests per second, which come at random times (Poisson), a measurement each."""
    requests: int = 200
    """Requests of a measurement."""
    seconds: float | None = None
    """Time after which a measurement begins no more requests; None begins all."""
    warmup: int = 4
    """Requests before the first measurement, one after the other; the first one also checks the server."""
    prompt_length: str = "512"
    """Tokens of a prompt: N, uniform:LOW:HIGH or normal:MEAN:STD. Without --tokenizer, words."""
    output_length: str = "128"
    """Tokens of a completion, likewise."""
    shared_prefix: int = 0
    """Tokens (words) that begin every prompt, before those of prompt_length."""
    tokenizer: Path | None = None
    """The model's tokenizer.json, so that prompts have exactly so many tokens (or less by the last word)."""
    temperature: float = 0.0
    """Of the draws; 0 takes the most likely token."""
    ignore_eos: bool = True
    """Ask the server (`ignore_eos`, a field of vLLM, SGLang and `mor serve`) for completions of the whole length."""
    extra_body: str = "{}"
    """Further fields of every request, as a JSON object."""
    timeout: float = 300.0
    """Seconds after which a request is given up."""
    seed: int = 0
    """Of prompts, lengths and arrivals."""
    label: str = ""
    """What the server is, for the results: its version, flags and device."""

    def __post_init__(self) -> None:
        require(min(self.concurrency, default=1) > 0, f"concurrency={self.concurrency} must be positive")
        for rate in self.rates:
            require(rate > 0 and math.isfinite(rate), f"rates={self.rates} must be positive and finite")
        require(self.requests > 0, f"requests={self.requests} must be positive")
        require(self.warmup > 0, f"warmup={self.warmup} must be positive: the first request checks the server")
        require(self.shared_prefix >= 0, f"shared_prefix={self.shared_prefix} must not be negative")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        require(self.timeout > 0, f"timeout={self.timeout} must be positive")
        require(self.seconds is None or self.seconds > 0, f"seconds={self.seconds} must be positive, or None")
        for name in ("prompt_length", "output_length"):
            parse_lengths(getattr(self, name), name)
        own = sorted(self.further_fields.keys() & {*_OWN_FIELDS})
        require(not own, f"extra_body names {', '.join(own)}, which the benchmark sets itself")

    @property
    def further_fields(self) -> dict[str, Any]:
        """Fields of every request beside model, prompt, length and streaming."""
        try:
            extra = json.loads(self.extra_body)
        except ValueError as error:
            raise UserError(f"extra_body={self.extra_body!r} is not JSON ({error})") from error
        require(isinstance(extra, dict), f"extra_body={self.extra_body!r} is not a JSON object")
        return {"temperature": self.temperature} | ({"ignore_eos": True} if self.ignore_eos else {}) | extra

    @property
    def loads(self) -> list[tuple[str, float]]:
        """The measurements: ("concurrency", requests in flight) or ("rate", requests per second)."""
        closed = self.concurrency or (() if self.rates else (8,))
        return [*(("concurrency", value) for value in closed), *(("rate", value) for value in self.rates)]


def parse_lengths(text: str, name: str) -> Lengths:
    """Read a distribution of lengths.

    Args:
        text: ``N``; ``uniform:LOW:HIGH``, both included; or ``normal:MEAN:STD``, rounded and at least 1.
        name: of the setting, for messages.

    Raises:
        UserError: it is none of these, or allows lengths outside 1 to 2^20.
    """
    kind, *values = text.split(":") if ":" in text else ("", text)
    try:
        first, *rest = map(float, values)
        last = rest[-1] if rest else first
        if len(values) != (1 if kind == "" else 2) or not math.isfinite(first + last):
            raise ValueError
    except ValueError:
        raise _refused(name, text, "is not N, uniform:LOW:HIGH or normal:MEAN:STD") from None
    if kind not in ("", "uniform", "normal"):
        raise _refused(name, text, "is not N, uniform:LOW:HIGH or normal:MEAN:STD")
    if kind == "normal":
        if not (1 <= first <= _LONGEST and 0 <= last <= _LONGEST):
            raise _refused(name, text, f"needs a mean of 1 to {_LONGEST} and a deviation that is not negative")
        return lambda rng: min(_LONGEST, max(1, round(rng.normalvariate(first, last))))
    if not (1 <= first <= last <= _LONGEST) or first % 1 or last % 1:
        raise _refused(name, text, f"needs whole numbers of 1 to {_LONGEST}, the lower one first")
    low, high = int(first), int(last)
    return lambda rng: low + int(rng.random() * (high - low + 1))


def _refused(name: str, text: str, rule: str) -> UserError:
    return UserError(f"{name}={text!r} {rule}")

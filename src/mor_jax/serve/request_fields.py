"""What bodies of completions and of chats have in common: how fields are read, and the choice of tokens.

What clients send without meaning it is accepted: OpenAI's fields about accounts, storage and routing, which cannot
change a completion, and the fields of other servers that speak OpenAI's form at the value that changes nothing.
"""

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from mor_jax.errors import UserError, suggest
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import MOST_BIASES, Sampling
from mor_jax.serve.http_errors import ApiError, from_user_error, invalid

_AS_THEY_ARE = "the model's probabilities are taken as they are"
ONLY: dict[str, tuple[Any, str]] = {
    "presence_penalty": (0, _AS_THEY_ARE),
    "frequency_penalty": (0, _AS_THEY_ARE),
    # of vLLM, SGLang, TGI and llama.cpp
    "repetition_penalty": (1, _AS_THEY_ARE),
    "length_penalty": (1, _AS_THEY_ARE),
    "min_p": (0, _AS_THEY_ARE),
    "typical_p": (1, _AS_THEY_ARE),
    "use_beam_search": (False, "every completion is drawn by itself; ask for several with n"),
    "include_stop_str_in_output": (False, "a completion ends before a stop string"),
    "skip_special_tokens": (True, "special tokens are no text"),
    "prompt_logprobs": (None, "completions tell them with echo=true and logprobs"),
}
"""Fields with the one value that is served, and the reason."""
SERVED = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "max_depth",
    "show_depth", "n", "logprobs", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids",
)  # fmt: skip
_IGNORED = (
    "user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "priority",
)  # fmt: skip
"""Fields that cannot change a completion."""
_STREAM_OPTIONS = {"include_usage": None, "include_obfuscation": None, "continuous_usage_stats": False}
"""With the one value that is served, or None for both. Obfuscation pads events; no server but OpenAI's does."""
_NO_SEED = -1
_STOPS, _STOP_LENGTH, _SHOWN = 4, 256, 60
_DIGITS = 40


@dataclass(frozen=True, kw_only=True)
class RequestFields:
    """What a client wants of every prompt."""

    max_tokens: int | None = 16
    """Tokens to generate at most, per completion; None is as many as fit behind the prompt."""
    n: int = 1
    """Completions per prompt."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    """Completion i, over all prompts, draws with ``seed + i``."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a completion."""
    ignore_eos: bool = False
    """Whether the model's own tokens that end a completion do not."""
    min_tokens: int = 0
    """Tokens before which no token ends a completion."""
    alternatives: int | None = None
    """Most likely tokens to tell beside every token's log-probability; None tells neither."""
    echo: bool = False
    """Whether a completion begins with the prompt."""
    max_depth: int | None = None
    """Extension: passes over the shared block that a token may take at most."""
    stream: bool = False
    """Whether to send tokens as they come."""
    include_usage: bool = False
    """Whether a stream ends with the number of tokens."""
    show_depth: bool = False
    """Extension: tell id, text, depth and log-probability of every token."""

    def engine_requests(
        self, prompts: Sequence[tuple[int, ...]], stop_tokens: tuple[int, ...], max_length: int
    ) -> list[Request]:
        """Build what the engine takes: ``n`` requests per prompt.

        Args:
            prompts: their tokens.
            stop_tokens: those of the model.
            max_length: tokens of a prompt and its completion.
        """
        stops = tuple(dict.fromkeys((() if self.ignore_eos else stop_tokens) + self.stop_token_ids))
        return [
            Request(
                tokens,
                max(1, max_length - len(tokens)) if self.max_tokens is None else self.max_tokens,
                replace(self.sampling, seed=(self.sampling.seed + index) % 2**32),
                stop_tokens=stops,
                max_depth=self.max_depth,
                min_tokens=self.min_tokens,
                alternatives=self.alternatives or 0,
                score_prompt=self.echo and self.alternatives is not None,
            )
            for index, tokens in enumerate(tokens for tokens in prompts for _ in range(self.n))
        ]


def read_body(body: bytes, model: str, served: Sequence[str], only: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Read a JSON object and refuse what is not served.

    Args:
        body: JSON.
        model: the name that the server gives its model.
        served: names of fields, beside those that are ignored.
        only: as ``ONLY``.

    Raises:
        ApiError: with the field, its value and the rule.
    """
    values = _load(body)
    _refuse_fields(values, served, only)
    if values.get("model") not in (None, model):
        message = f"model={show(values['model'])} is not served here; the model is {model!r}"
        raise ApiError(404, message, field="model", code="model_not_found")
    return values


def common_fields(values: dict[str, Any], max_completions: int, prompts: int = 1) -> dict[str, Any]:
    """Read what both forms spell alike: all of ``RequestFields`` but ``max_tokens``, ``alternatives`` and ``echo``.

    Args:
        values: of ``read_body``.
        max_completions: completions of a request at most.
        prompts: of the request.

    Raises:
        ApiError: with the field, its value and the rule.
    """
    stream = flag(values, "stream")
    try:
        sampling = Sampling(
            temperature=_number(values, "temperature", 1.0),
            top_k=_top_k(values),
            top_p=_number(values, "top_p", 1.0),
            seed=_seed(values),
            logit_bias=_logit_bias(values.get("logit_bias")),
        )
    except UserError as error:
        raise from_user_error(error, "sampling") from error
    n = integer(values, "n", 1)
    if n < 1 or n * prompts > max_completions:
        raise invalid("n", f"n={show(n)} for each of {prompts} prompts is outside 1..{max_completions} completions")
    min_tokens = integer(values, "min_tokens", 0)
    if min_tokens < 0:
        raise invalid("min_tokens", f"min_tokens={show(min_tokens)} must not be negative")
    return {
        "n": n,
        "sampling": sampling,
        "stop": _stop(values.get("stop")),
        "stop_token_ids": _stop_token_ids(values.get("stop_token_ids")),
        "ignore_eos": flag(values, "ignore_eos"),
        "min_tokens": min_tokens,
        "max_depth": integer(values, "max_depth", None),
        "stream": stream,
        "include_usage": _include_usage(values, stream),
        "show_depth": flag(values, "show_depth"),
    }


def _load(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_number, parse_int=_short_integer, object_pairs_hook=_once)
    except _RefusedError as error:
        raise invalid(None, f"the body is refused: {error}") from error
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON: {str(error)[:200] or 'nested too deeply'}") from error
    if not isinstance(values, dict):
        raise invalid(None, f"the body must be a JSON object, not {type(values).__name__}")
    return values


class _RefusedError(ValueError):
    """The body is JSON, but nobody can mean it."""


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _short_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS:
        raise _RefusedError(f"an integer of more than {_DIGITS} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; which of two equal names a client means, or another reader of the body takes, nobody can know."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _RefusedError(f"{show(twice)} stands there more than once")
    return values


def _refuse_fields(values: dict[str, Any], served: Sequence[str], only: Mapping[str, tuple[Any, str]]) -> None:
    for name, value in values.items():
        if name in only:
            one, reason = only[name]
            same = type(value) is type(one) if isinstance(one, bool) else not isinstance(value, bool)
            if not (value is None or (same and value == one) or (one is None and value in ("", {}, []))):
                raise invalid(name, f"{name}={show(value)} is not served, only {json.dumps(one)}: {reason}")
        elif name not in served and name not in _IGNORED:
            hint = suggest(name, served)
            raise invalid(None, f"unknown field {show(name)}{hint}")


def text(name: str, value: str) -> str:
    """Return a text, which must be Unicode."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(name, f"{name}: character {error.start} is half of a surrogate pair") from error
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"stop={show(value)} must be a text or a list of texts")
    if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
        raise invalid("stop", f"stop={show(value)} must be at most {_STOPS} texts of 1 to {_STOP_LENGTH} characters")
    return tuple(text("stop", stop) for stop in stops)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise invalid("stop_token_ids", f"stop_token_ids={show(value)} must be a list of token ids")
    return tuple(ids)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    value = {} if value is None else value
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise invalid("logit_bias", f"logit_bias={show(value)} must be an object of at most {MOST_BIASES} token ids")
    for name, bias in value.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and str(int(name)) == name):
            raise invalid("logit_bias", f"logit_bias: {show(name)} is not a token id")
        if type(bias) not in (int, float):
            raise invalid("logit_bias", f"logit_bias: {name}: {show(bias)} is not a number")
    return tuple((int(name), float(bias) if abs(bias) < 2**31 else 2.0**31) for name, bias in value.items())


def _include_usage(values: dict[str, Any], stream: bool) -> bool:
    options = values.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options", "stream_options needs stream=true")
    if not isinstance(options, dict) or set(options) - set(_STREAM_OPTIONS):
        known = ", ".join(_STREAM_OPTIONS)
        raise invalid("stream_options", f"stream_options={show(options)} may hold only {known}")
    flags = {name: flag(options, name) for name in _STREAM_OPTIONS}
    for name, only in _STREAM_OPTIONS.items():
        if only is not None and flags[name] != only:
            raise invalid("stream_options", f"stream_options.{name}=true is not served, only false")
    return flags["include_usage"]


def _seed(values: dict[str, Any]) -> int:
    """A seed of 32 bits: as it is, folded from any signed 64-bit integer, or drawn where none is given."""
    seed = integer(values, "seed", _NO_SEED)
    if seed == _NO_SEED:
        return secrets.randbelow(2**32)
    if not -(2**63) <= seed < 2**63:
        raise invalid("seed", f"seed={show(seed)} is outside [-2^63, 2^63)")
    return (seed ^ (seed >> 32)) % 2**32


def _top_k(values: dict[str, Any]) -> int:
    """0 for all tokens, for which other servers also take -1."""
    top_k = integer(values, "top_k", 0)
    return 0 if top_k == -1 else top_k


def integer(values: dict[str, Any], name: str, default: Any) -> Any:
    """Read an integer; null is the default."""
    value = values.get(name)
    if value is not None and type(value) is not int:
        raise invalid(name, f"{name}={show(value)} must be an integer")
    return default if value is None else value


def _number(values: dict[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is not None and type(value) not in (int, float):
        raise invalid(name, f"{name}={show(value)} must be a number")
    return default if value is None else value


def flag(values: dict[str, Any], name: str) -> bool:
    """Read a truth value; null is false."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"{name}={show(value)} must be true or false")
    return bool(value)


def show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        shown = json.dumps(value)
    except RecursionError:  # nested as deeply as could just be read
        return "..."
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."

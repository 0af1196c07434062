"""The body of ``POST /v1/completions``: OpenAI's fields, three extensions, and what is refused and why.

What clients send without meaning it is accepted: OpenAI's fields about accounts, storage and routing, which cannot
change a completion, and the fields of other servers that speak OpenAI's form at the value that changes nothing.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mor_jax.errors import UserError, suggest
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import Sampling
from mor_jax.serve.http_errors import ApiError, from_user_error, invalid

Prompt = str | tuple[int, ...]
_AS_THEY_ARE = "the model's probabilities are taken as they are"
_ENDS = "a completion ends at end of text, a stop string or max_tokens"
_ONLY = {
    "n": (1, "every prompt gets one completion"),
    "best_of": (1, "every prompt gets one completion"),
    "echo": (False, "the prompt is not repeated"),
    "logprobs": (None, "show_depth=true tells the log-probability of every token"),
    "suffix": (None, "text is only continued"),
    "presence_penalty": (0, _AS_THEY_ARE),
    "frequency_penalty": (0, _AS_THEY_ARE),
    "logit_bias": (None, _AS_THEY_ARE),
    # of vLLM, SGLang, TGI and llama.cpp
    "repetition_penalty": (1, _AS_THEY_ARE),
    "length_penalty": (1, _AS_THEY_ARE),
    "min_p": (0, _AS_THEY_ARE),
    "typical_p": (1, _AS_THEY_ARE),
    "use_beam_search": (False, "every prompt gets one completion"),
    "min_tokens": (0, _ENDS),
    "ignore_eos": (False, _ENDS),
    "stop_token_ids": (None, _ENDS),
    "include_stop_str_in_output": (False, _ENDS),
    "skip_special_tokens": (True, "special tokens are no text"),
    "prompt_logprobs": (None, "the prompt is not repeated"),
}
"""Fields with the one value that is served, and the reason."""
_SERVED = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options",
    "max_depth", "show_depth",
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


@dataclass(frozen=True)
class CompletionRequest:
    """What a client wants."""

    prompts: tuple[Prompt, ...]
    """Texts or token ids, at least one."""
    max_tokens: int = 16
    """Tokens to generate at most, per prompt."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    """Prompt i draws with ``seed + i``."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    max_depth: int | None = None
    """Extension: passes over the shared block that a token may take at most."""
    stream: bool = False
    """Whether to send tokens as they come."""
    include_usage: bool = False
    """Whether a stream ends with the number of tokens."""
    show_depth: bool = False
    """Extension: tell id, text, depth and log-probability of every token."""

    def engine_request(self, index: int, tokens: tuple[int, ...], stop_tokens: tuple[int, ...]) -> Request:
        """Build what the engine takes for one prompt."""
        options = self.sampling
        seeded = Sampling(options.temperature, options.top_k, options.top_p, (options.seed + index) % 2**32)
        return Request(tokens, self.max_tokens, seeded, stop_tokens=stop_tokens, max_depth=self.max_depth)


def parse_completion_request(body: bytes, model: str, max_prompts: int) -> CompletionRequest:
    """Read and check a body.

    Args:
        body: JSON.
        model: the name that the server gives its model.
        max_prompts: prompts at most.

    Raises:
        ApiError: with the field, its value and the rule.
    """
    values = _load(body)
    _refuse_fields(values)
    if values.get("model") not in (None, model):
        message = f"model={_show(values['model'])} is not served here; the model is {model!r}"
        raise ApiError(404, message, field="model", code="model_not_found")
    stream = _flag(values, "stream")
    try:
        sampling = Sampling(
            temperature=_number(values, "temperature", 1.0),
            top_k=_top_k(values),
            top_p=_number(values, "top_p", 1.0),
            seed=_seed(values),
        )
    except UserError as error:
        raise from_user_error(error, "sampling") from error
    return CompletionRequest(
        prompts=_prompts(values.get("prompt"), max_prompts),
        max_tokens=_integer(values, "max_tokens", 16),
        sampling=sampling,
        stop=_stop(values.get("stop")),
        max_depth=_integer(values, "max_depth", None),
        stream=stream,
        include_usage=_include_usage(values, stream),
        show_depth=_flag(values, "show_depth"),
    )


def _load(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON: {str(error)[:200] or 'nested too deeply'}") from error
    if not isinstance(values, dict):
        raise invalid(None, f"the body must be a JSON object, not {type(values).__name__}")
    return values


def _refuse_fields(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in _ONLY:
            only, reason = _ONLY[name]
            same = type(value) is type(only) if isinstance(only, bool) else not isinstance(value, bool)
            if not (value is None or (same and value == only) or (only is None and value in ("", {}, []))):
                raise invalid(name, f"{name}={_show(value)} is not served, only {json.dumps(only)}: {reason}")
        elif name not in _SERVED and name not in _IGNORED:
            hint = suggest(name, _SERVED)
            raise invalid(None, f"unknown field {_show(name)}{hint}")


def _prompts(value: Any, most: int) -> tuple[Prompt, ...]:
    if value is None:
        raise invalid("prompt", "prompt is missing")
    if isinstance(value, str) or _is_tokens(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", f"prompt={_show(value)} must be a text, a list of token ids, or a list of these")
    if len(value) > most:
        raise invalid("prompt", f"prompt holds {len(value)} prompts, more than {most}")
    return tuple(_prompt(prompt) for prompt in value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _text("prompt", value)
    if _is_tokens(value):
        return tuple(value)
    raise invalid("prompt", f"prompt: {_show(value)} is neither a text nor a list of token ids")


def _text(name: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(name, f"{name}: character {error.start} is half of a surrogate pair") from error
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"stop={_show(value)} must be a text or a list of texts")
    if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
        raise invalid("stop", f"stop={_show(value)} must be at most {_STOPS} texts of 1 to {_STOP_LENGTH} characters")
    return tuple(_text("stop", stop) for stop in stops)


def _include_usage(values: dict[str, Any], stream: bool) -> bool:
    options = values.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options", "stream_options needs stream=true")
    if not isinstance(options, dict) or set(options) - set(_STREAM_OPTIONS):
        known = ", ".join(_STREAM_OPTIONS)
        raise invalid("stream_options", f"stream_options={_show(options)} may hold only {known}")
    flags = {name: _flag(options, name) for name in _STREAM_OPTIONS}
    for name, only in _STREAM_OPTIONS.items():
        if only is not None and flags[name] != only:
            raise invalid("stream_options", f"stream_options.{name}=true is not served, only false")
    return flags["include_usage"]


def _seed(values: dict[str, Any]) -> int:
    """A seed of 32 bits: as it is, folded from any signed 64-bit integer, or drawn where none is given."""
    seed = _integer(values, "seed", _NO_SEED)
    if seed == _NO_SEED:
        return secrets.randbelow(2**32)
    if not -(2**63) <= seed < 2**63:
        raise invalid("seed", f"seed={_show(seed)} is outside [-2^63, 2^63)")
    return (seed ^ (seed >> 32)) % 2**32


def _top_k(values: dict[str, Any]) -> int:
    """0 for all tokens, for which other servers also take -1."""
    top_k = _integer(values, "top_k", 0)
    return 0 if top_k == -1 else top_k


def _integer(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    if value is not None and type(value) is not int:
        raise invalid(name, f"{name}={_show(value)} must be an integer")
    return default if value is None else value


def _number(values: dict[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is not None and type(value) not in (int, float):
        raise invalid(name, f"{name}={_show(value)} must be a number")
    return default if value is None else value


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"{name}={_show(value)} must be true or false")
    return bool(value)


def _show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = json.dumps(value)
    except RecursionError:  # nested as deeply as could just be read
        return "..."
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

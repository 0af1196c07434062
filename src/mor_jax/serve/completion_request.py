"""The body of ``POST /v1/completions``: OpenAI's fields, some of other servers, and three extensions."""

from dataclasses import dataclass
from typing import Any

from mor_jax.serve.http_errors import invalid
from mor_jax.serve.request_fields import (
    ONLY,
    SERVED,
    RequestFields,
    common_fields,
    flag,
    integer,
    read_body,
    show,
    text,
)

Prompt = str | tuple[int, ...]
_SERVED = (*SERVED, "prompt", "echo", "best_of")
_ONLY = {**ONLY, "suffix": (None, "text is only continued")}


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(RequestFields):
    """What a client wants."""

    prompts: tuple[Prompt, ...]
    """Texts or token ids, at least one."""


def parse_completion_request(body: bytes, model: str, max_prompts: int) -> CompletionRequest:
    """Read and check a body.

    Args:
        body: JSON.
        model: the name that the server gives its model.
        max_prompts: completions at most.

    Raises:
        ApiError: with the field, its value and the rule.
    """
    values = read_body(body, model, _SERVED, _ONLY)
    prompts = _prompts(values.get("prompt"), max_prompts)
    fields = common_fields(values, max_prompts, len(prompts))
    best_of = integer(values, "best_of", fields["n"])
    if best_of != fields["n"]:
        raise invalid("best_of", f"best_of={show(best_of)} must be n={fields['n']}: all completions are returned")
    max_tokens = integer(values, "max_tokens", 16)
    alternatives = integer(values, "logprobs", None)
    echo = flag(values, "echo")
    return CompletionRequest(prompts=prompts, max_tokens=max_tokens, alternatives=alternatives, echo=echo, **fields)


def _prompts(value: Any, most: int) -> tuple[Prompt, ...]:
    if value is None:
        raise invalid("prompt", "prompt is missing")
    if isinstance(value, str) or _is_tokens(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", f"prompt={show(value)} must be a text, a list of token ids, or a list of these")
    if len(value) > most:
        raise invalid("prompt", f"prompt holds {len(value)} prompts, more than {most}")
    return tuple(_prompt(prompt) for prompt in value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return text("prompt", value)
    if _is_tokens(value):
        return tuple(value)
    raise invalid("prompt", f"prompt: {show(value)} is neither a text nor a list of token ids")

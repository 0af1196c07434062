"""The body of ``POST /v1/chat/completions``: OpenAI's fields, some of other servers, and three extensions."""

from dataclasses import dataclass
from typing import Any

from mor_jax.serve.http_errors import invalid
from mor_jax.serve.request_fields import ONLY, SERVED, RequestFields, common_fields, flag, integer, read_body, show

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 4096
_SERVED = (*SERVED, "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt")
_NO_TOOLS, _TEXT = "tools are not called", "answers are plain text"
_ONLY = {
    **ONLY,
    "tools": (None, _NO_TOOLS),
    "tool_choice": ("none", _NO_TOOLS),
    "parallel_tool_calls": (None, _NO_TOOLS),
    "functions": (None, _NO_TOOLS),
    "function_call": ("none", _NO_TOOLS),
    "response_format": ({"type": "text"}, _TEXT),
    "modalities": (["text"], _TEXT),
    "audio": (None, _TEXT),
    "prediction": (None, "nothing is predicted"),
    "reasoning_effort": (None, "max_depth is what bounds a token's passes"),
    "verbosity": (None, "max_tokens is what bounds an answer"),
    "web_search_options": (None, "nothing is searched"),
    "echo": (False, "messages are not repeated"),
    # of vLLM
    "chat_template": (None, "the model's own template is used"),
    "chat_template_kwargs": (None, "the model's own template is used"),
    "documents": (None, "the template gets messages alone"),
    "continue_final_message": (False, "an answer is a message of its own"),
    "add_special_tokens": (False, "the template says what stands around messages"),
}
_NEUTRAL = ("refusal", "audio", "annotations", "function_call", "tool_calls", "reasoning_content")
"""Fields of an answer that clients send back as part of a conversation: empty, or refused."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest(RequestFields):
    """What a client wants."""

    messages: tuple[dict[str, str], ...]
    """`role`, `content` and perhaps `name`, at least one."""
    add_generation_prompt: bool = True
    """Whether the text ends with what begins an answer."""


def parse_chat_request(body: bytes, model: str, max_completions: int) -> ChatRequest:
    """Read and check a body.

    Args:
        body: JSON.
        model: the name that the server gives its model.
        max_completions: answers at most.

    Raises:
        ApiError: with the field, its value and the rule.
    """
    values = read_body(body, model, _SERVED, _ONLY)
    fields = common_fields(values, max_completions)
    named = {name: integer(values, name, None) for name in ("max_completion_tokens", "max_tokens")}
    limits = {name: value for name, value in named.items() if value is not None}
    if len(set(limits.values())) > 1:
        raise invalid("max_completion_tokens", f"{', '.join(f'{n}={show(v)}' for n, v in limits.items())} disagree")
    told = flag(values, "logprobs")
    top = integer(values, "top_logprobs", 0)
    if top and not told:
        raise invalid("top_logprobs", f"top_logprobs={show(top)} needs logprobs=true")
    return ChatRequest(
        messages=_messages(values.get("messages")),
        add_generation_prompt=values.get("add_generation_prompt") is None or flag(values, "add_generation_prompt"),
        max_tokens=next(iter(limits.values()), None),
        alternatives=top if told else None,
        **fields,
    )


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if value is None:
        raise invalid("messages", "messages is missing")
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise invalid("messages", f"messages={show(value)} must be a list of 1 to {MOST_MESSAGES} messages")
    return tuple(_message(f"messages[{nth}]", message) for nth, message in enumerate(value))


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise invalid("messages", f"{where}={show(value)} must be an object")
    for name in value:
        if name in _NEUTRAL and value[name] in (None, [], ""):
            continue
        if name not in ("role", "content", "name"):
            raise invalid("messages", f"{where}.{show(name)} is not served: a message has role, content and name")
    role = value.get("role")
    if role not in ROLES:
        raise invalid("messages", f"{where}.role={show(role)} is not one of {', '.join(ROLES)}")
    message = {"role": role, "content": _content(f"{where}.content", value.get("content"))}
    name = value.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise invalid("messages", f"{where}.name={show(name)} must be a text")
        message["name"] = _text(f"{where}.name", name)
    return message


def _content(where: str, value: Any) -> str:
    """A text, or the texts of the parts of one, each on lines of its own."""
    if isinstance(value, str):
        return _text(where, value)
    if not isinstance(value, list) or not value:
        raise invalid("messages", f"{where}={show(value)} must be a text or a list of text parts")
    parts = []
    for part in value:
        is_text = isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"
        if not is_text or not isinstance(part["text"], str):
            raise invalid("messages", f'{where}: {show(part)} is not {{"type": "text", "text": ...}}')
        parts.append(_text(where, part["text"]))
    return "\n".join(parts)


def _text(where: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid("messages", f"{where}: character {error.start} is half of a surrogate pair") from error
    return value

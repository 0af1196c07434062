"""Malformed and hostile requests: bodies written by hand, every field with every value of a list, and bytes that are
hardly HTTP."""

import json
from collections.abc import Callable, Iterator
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_READ = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
BODIES = [
    b"", b"{", b"}", b"null", b"3", b'"text"', b"[]", b"[" * 100_000, b'{"prompt":' * 50_000, b"\xff\xfe{}", b"\x00",
    b'{"prompt": "a"}}', b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "top_p": -0.0e1, "top_k": -9e999}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"max_tokens": ' + b"9" * 4000 + b"}", b'{"prompt": "a", "seed": 1e400}',
    b'{"prompt": "a", "n": 1, "n": 2}', b'{"prompt": "a", "prompt": "a"}',
    b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}', b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a\xff"}', b'{"prompt": "a", "user": "\xc0\xaf"}', b'{"prompt": "a\nb"}', b'{"prompt": "a",}',
    b"{'prompt': 'a'}", b'{"prompt": "a"} {"prompt": "a"}', '{"prompt": "a", "n": 0}'.encode("utf-16"), b"prompt=a",
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"messages": ' + b'{"content":' * 900 + b"1" + b"}" * 901,
    b'{"prompt": "a"' + b"".join(b', "%d": 1' % n for n in range(70_000)) + b', "1": 1}',
    b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b', "prompt": "a"}',
]  # fmt: skip
"""Sent to both paths."""
FIELDS = [
    {"min_tokens": 17, "max_tokens": 16}, {"stop": ["x"] * 9}, {"stop": "x" * 300}, {"stop": ["a", "\ud800"]},
    {"logit_bias": {"999999999": 1}}, {"logit_bias": {"1e3": 1}}, {"logit_bias": {"1": 10**30}},
    {"logit_bias": {str(token): -100 for token in range(301)}}, {"logit_bias": {"\u0661": 1}},
    {"stop_token_ids": list(range(9))}, {"stop_token_ids": [257]},
    {"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": [1]},
    {"stream": True, "stream_options": {"include_usage": 1}}, {"stream": True, "stream_options": {"x": True}},
    {"guided_json": {}}, {"__proto__": {}}, {"__class__": "x"}, {"x" * 2000: 1}, {"": 1}, {"\ud800": 1}, {"N": 1},
    {"model": "../../etc/passwd"}, {"n": 2, "best_of": 3}, {"response_format": {"type": "json_object"}},
    {"chat_template": _LOOP}, {"chat_template": _READ}, {"chat_template_kwargs": {"messages": _READ}},
]  # fmt: skip
"""Added to a good request, on both paths."""
PROMPTS = [
    {"prompt": ["a"] * 1000}, {"prompt": "a" * 2000}, {"prompt": [1] * 1000}, {"prompt": ["a"] * 10, "n": 10},
    {"prompt": [257]}, {"prompt": "a" * 97, "max_tokens": 0}, {"prompt": ["a", "\udfff"]}, {"prompt": [[], [1]]},
    {"prompt": "a", "max_tokens": 96}, {"prompt": [[1, 2], [True]]}, {"prompt": ["a", 1]}, {"suffix": "x"},
]  # fmt: skip
"""Of completions alone."""
MESSAGES = [
    [], [[]], ["a"], [{}], [None], [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": "a"}] * 5000,
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"role": "user", "content": "a", "__class__": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], [{"role": "user", "content": "a" * 2000}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    [{"role": "tool", "content": "a", "tool_call_id": "1"}], [{"role": "user ", "content": "a"}],
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2},
}
VALUES = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 10**41, 0.5, -0.5, 1e308, "", "x", "NaN", "\ud800",
    [], [1], [-1], [2**70], [1.5], [True], [None], ["x"], [""], [[]], [{}], [[1], "x"],
    {}, {"a": 1}, {"1": 1}, {"1": "x"}, {"-1": 1}, {"": {}}, {"a": {"b": [{}]}},
]  # fmt: skip
"""Of every field."""


def _is_integer(least: int, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _one_of(*values: Any) -> Callable[[Any], bool]:
    spelt = set(map(json.dumps, values))  # to Python 1 is True
    return lambda value: json.dumps(value) in spelt


_FLAG = _one_of(True, False)
_NOTHING = _one_of("", [], {})
RIGHT: dict[str, Callable[[Any], bool]] = {
    "model": _one_of(), "max_tokens": _is_integer(0, 7), "temperature": _one_of(0, 1, 7, 0.5),
    "top_p": _one_of(0, 1, 0.5), "top_k": _is_integer(-1, 2**31 - 1), "seed": _is_integer(-(2**63), 2**63 - 1),
    "stop": _one_of("x", "NaN", [], ["x"]), "stream": _FLAG, "stream_options": _one_of(),
    "max_depth": _is_integer(1, 10**39), "show_depth": _FLAG, "n": _is_integer(1, 16), "min_tokens": _is_integer(0, 2),
    "logit_bias": _one_of({}, {"1": 1}), "ignore_eos": _FLAG, "stop_token_ids": _one_of([], [1]),
    "presence_penalty": _one_of(0), "frequency_penalty": _one_of(0), "repetition_penalty": _one_of(1),
    "length_penalty": _one_of(1), "min_p": _one_of(0), "typical_p": _one_of(1), "use_beam_search": _one_of(False),
    "include_stop_str_in_output": _one_of(False), "skip_special_tokens": _one_of(True), "prompt_logprobs": _NOTHING,
}  # fmt: skip
"""Which of the values a field of both forms takes, beside null."""
RIGHT_OF: dict[str, dict[str, Callable[[Any], bool]]] = {
    COMPLETIONS: {
        "prompt": _one_of("", "x", "NaN", [1], ["x"], [""], [[1], "x"]), "logprobs": _is_integer(0, 20), "echo": _FLAG,
        "best_of": _one_of(1), "suffix": _NOTHING, "tools": _one_of(), "messages": _one_of(),
    },
    CHAT: {
        "messages": _one_of(), "max_completion_tokens": _is_integer(0, 7), "max_tokens": _one_of(), "logprobs": _FLAG,
        "top_logprobs": _one_of(0), "add_generation_prompt": _FLAG, "echo": _one_of(False), "prompt": _one_of(),
        "continue_final_message": _one_of(False), "add_special_tokens": _one_of(False), "response_format": _one_of(),
        "tool_choice": _one_of(), "function_call": _one_of(), "modalities": _one_of(), "best_of": _one_of(),
        **dict.fromkeys(
            ("tools", "parallel_tool_calls", "functions", "audio", "prediction", "reasoning_effort", "verbosity",
             "web_search_options", "chat_template", "chat_template_kwargs", "documents"), _NOTHING,
        ),
    },
}  # fmt: skip
UNKNOWN = {COMPLETIONS: ("tools", "messages"), CHAT: ("prompt", "best_of")}
"""Fields of the other form, which not even null may have; the field with what is asked may not be null either."""
_MESSAGE: dict[str, Callable[[Any], bool]] = {
    "role": _one_of(), "content": _one_of("", "x", "NaN"), "name": _one_of(None, "", "x", "NaN"),
    **dict.fromkeys(("refusal", "audio", "annotations", "tool_calls"), _one_of(None, "", [])), "weight": _one_of(),
}  # fmt: skip


def bodies() -> Iterator[tuple[str, bytes, bool]]:
    """Path, body, and whether it is right: by hand none is."""
    for path, good in GOOD.items():
        yield from ((path, body, False) for body in BODIES)
        yield from ((path, json.dumps(good | fields).encode(), False) for fields in FIELDS)
        for name, right in (RIGHT | RIGHT_OF[path]).items():
            missing = name in UNKNOWN[path] or name in ("prompt", "messages")
            for value in VALUES:
                fits = not missing if value is None else right(value)
                yield path, json.dumps(good | {name: value}).encode(), fits
    good = GOOD[COMPLETIONS]
    yield from ((COMPLETIONS, json.dumps(good | fields).encode(), False) for fields in PROMPTS)
    for messages in MESSAGES:
        yield CHAT, json.dumps({"messages": messages, "max_tokens": 2}).encode(), False
    for name, right in _MESSAGE.items():
        for value in VALUES:
            message = {"role": "user", "content": "a", name: value}
            yield CHAT, json.dumps({"messages": [message], "max_tokens": 2}).encode(), right(value)
    for top in (21, -1, "5", 10**30):
        yield CHAT, json.dumps(GOOD[CHAT] | {"top_logprobs": top, "logprobs": True}).encode(), False


_HOST, _JSON = b"Host: localhost\r\n", b"Content-Type: application/json\r\n"
_BODY = b'{"prompt": 3}'
_CHUNKED = b"Transfer-Encoding: chunked\r\n"


def _post(
    more: bytes = b"",
    body: bytes = _BODY,
    length: bytes | None = None,
    host: bytes = _HOST,
    kind: bytes = _JSON,
    line: bytes = b"POST /v1/completions HTTP/1.1\r\n",
) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if length is None else length
    return line + host + kind + length + more + b"\r\n" + body


def _get(path: bytes, more: bytes = b"", version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/" + version + b"\r\n" + _HOST + more + b"\r\n"


FOLLOWED = {b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": [421, 400], _post() + b"\0\1garbage" * 50: [400, 400]}
"""A message and after it what is none, and the statuses of the answers that the two get."""
RAW = [
    b"\0" * 100, b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, b"\r\n" * 5000,
    *FOLLOWED, b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 1_000_000,
    _get(b"/health", b"A b\r\n"), _get(b"/health", b"A: \0\r\n"), _get(b"/health", b"A : b\r\n"),
    _get(b"/health", version=b"x.y"), _get(b"/health", method=b"get"), _get(b"/health", _HOST),
    _get(b"/" + b"a" * 300_000),
    _get(b"/\xff\xfe"), _get(b"/%00"), _get(b"/../../etc/passwd"), _get(b"/v1/models/..%2f..%2fetc%2fpasswd"),
    _get(b"/v1/models/%ED%A0%80"), _get(b"/v1/models/%zz%f"), _get(b"http://evil/v1/none"), _get(b"/x?" + b"a&" * 9999),
    _get(b"*", method=b"OPTIONS"), _get(b"evil:80", method=b"CONNECT"), _get(b"/v1/completions", method=b"HEAD"),
    _get(b"/v1/completions", method=b"TRACE"), _get(b"/v1/completions", method=b"DELETE"),
    _post(host=b""), _post(host=b"Host: a@localhost\r\n"), _post(host=b"Host: \xff\r\n"), _post(host=b"Host: evil\r\n"),
    *(_post(length=b"Content-Length: " + wrong + b"\r\n")
      for wrong in (b"-1", b"abc", b"+5", b"1e3", b"5, 6", b"5\r\nContent-Length: 6", b"9" * 30, b"5", b"0", b"")),
    _post(length=b""), _post(_CHUNKED, b"5\r\nabcde\r\n0\r\n\r\n"), _post(b"A: " + b"x" * 50_000 + b"\r\n"),
    *(_post(length=b"Transfer-Encoding: " + wrong + b"\r\n") for wrong in (b"gzip", b"chunked, chunked", b"xchunked")),
    *(_post(length=_CHUNKED, body=wrong)
      for wrong in (b"zz\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc\r\n0\r\n\r\n", b"f" * 40 + b"\r\nabc\r\n0\r\n\r\n",
                    b"5;" + b"x" * 50_000 + b"\r\nabcde\r\n0\r\n\r\n",
                    b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 5000 + b"\r\n")),
    _post() * 50, _post(b"Expect: tea\r\n"),
    _post(b"Upgrade: websocket\r\nConnection: Upgrade\r\n"), _post(b"Upgrade: h2c\r\nConnection: Upgrade\r\n"),
    _post(kind=b""), _post(b"Content-Encoding: gzip\r\n", b"\x1f\x8b\x08" + b"\0" * 50),
    *(_post(kind=b"Content-Type: " + wrong + b"\r\n")
      for wrong in (b"\xff", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data", b"x" * 5000)),
]  # fmt: skip
"""Bytes on a connection that the server must answer with 4xx, or close."""
SLOW = [
    b"", b"POST /v1/completions HTTP/1.1\r\nHo", _post(length=b"Content-Length: 500\r\n"),
    _post(length=b"Content-Length: 10000000000\r\n"), _post(length=_CHUNKED, body=b"5\nabcde\n0\n\n"),
    _post(length=_CHUNKED, body=b"5\r\nab"), _post(length=_CHUNKED, body=b"5\r\nabcde\r\n"),
]  # fmt: skip
"""Likewise, but whether more comes the server can only know after ``read_seconds``."""
DRIPPING = [
    b"GET /health HTTP/1.1\r\nA: ",
    _post(length=b"Content-Length: 500\r\n"),
    _post(length=_CHUNKED, body=b"5\r\n"),
]
"""Likewise; more does come, a byte at a time."""

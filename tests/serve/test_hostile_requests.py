"""A table of malformed and hostile requests: each gets a clean 4xx at once, and the server answers the next one."""

import json
import time

import pytest
from live_server import TEMPLATE, running, tiny_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_READ = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
BODIES = [
    b"", b"{", b"}", b"null", b"3", b'"text"', b"[]", b"[" * 100_000, b'{"prompt":' * 50_000, b"\xff\xfe{}", b"\x00",
    b'{"prompt": "a"}}', b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "\\ud800"}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "seed": 1e400}', b"{'prompt': 'a'}",
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"messages": ' + b'{"content":' * 900 + b"1" + b"}" * 901,
]  # fmt: skip
"""Sent to both paths."""
FIELDS = [
    {"n": -1}, {"n": 0}, {"n": 2**31}, {"n": 10**40}, {"n": 1.5}, {"n": "2"}, {"n": [1]},
    {"max_tokens": -1}, {"max_tokens": 2**40}, {"max_tokens": 10**400}, {"max_tokens": 1e3}, {"max_tokens": {}},
    {"min_tokens": -5}, {"min_tokens": 2**70}, {"min_tokens": 17, "max_tokens": 16}, {"min_tokens": True},
    {"temperature": -0.1}, {"temperature": 10**300}, {"temperature": "NaN"}, {"top_p": -1}, {"top_p": 2},
    {"top_k": -3}, {"top_k": 2**31}, {"seed": 2**64}, {"seed": "x"}, {"stop": [[]]}, {"stop": ["x"] * 9},
    {"stop": "x" * 300}, {"stop": [""]}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"999999999": 1}},
    {"logit_bias": {"1e3": 1}}, {"logit_bias": {"1": 10**300}}, {"logit_bias": {"1": "x"}}, {"logit_bias": "x"},
    {"logit_bias": {str(token): -100 for token in range(301)}}, {"stop_token_ids": [-1]}, {"stop_token_ids": [2**80]},
    {"stop_token_ids": list(range(9))}, {"stop_token_ids": {"1": 1}}, {"ignore_eos": "yes"}, {"max_depth": 0},
    {"max_depth": -(2**70)}, {"max_depth": "3"}, {"stream": "true"}, {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": [1]}, {"presence_penalty": 1}, {"use_beam_search": True}, {"tools": [{}]},
    {"guided_json": {}}, {"__proto__": {}}, {"x" * 2000: 1}, {"model": "../../etc/passwd"}, {"model": {"a": []}},
    {"chat_template": _LOOP}, {"chat_template": _READ}, {"chat_template_kwargs": {"messages": _READ}},
]  # fmt: skip
"""Added to a good request, on both paths."""
PROMPTS = [
    {"prompt": [2**80]}, {"prompt": [-1]}, {"prompt": [1.5]}, {"prompt": [[], [1]]}, {"prompt": ["a"] * 1000},
    {"prompt": {"a": 1}}, {"prompt": [None]}, {"prompt": "a" * 2000}, {"prompt": [1] * 1000}, {"logprobs": 21},
    {"logprobs": -1}, {"logprobs": True}, {"logprobs": 10**30}, {"echo": 2}, {"best_of": 4}, {"suffix": "x"},
    {"prompt": ["a"] * 10, "n": 10},
]  # fmt: skip
"""Of completions alone."""
MESSAGES = [
    [], [[]], ["a"], {}, "a", 3, [{}], [{"role": "user"}], [{"role": "root", "content": "a"}],
    [{"role": 1, "content": "a"}],
    [{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"role": "user", "content": "a", "name": []}],
    [{"role": "user", "content": "a", "__class__": "x"}], [{"role": "user", "content": "a" * 2000}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], [{"role": "user", "content": "a"}] * 5000,
    [{"role": "user", "content": "\ud800"}], [{"role": "tool", "content": "a", "tool_call_id": "1"}],
]  # fmt: skip
GOOD = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": [{"role": "user", "content": "a"}]}}
CASES = [
    *((path, body) for path in GOOD for body in BODIES),
    *((path, json.dumps(good | fields).encode()) for path, good in GOOD.items() for fields in FIELDS),
    *((COMPLETIONS, json.dumps(GOOD[COMPLETIONS] | fields).encode()) for fields in PROMPTS),
    *((CHAT, json.dumps({"messages": messages}).encode()) for messages in MESSAGES),
    *((CHAT, json.dumps(GOOD[CHAT] | {"top_logprobs": top, "logprobs": True}).encode()) for top in (21, -1, "5")),
]


@pytest.fixture(scope="module")
def client():
    with running(tiny_model(TEMPLATE)) as client:
        yield client


def test_each_gets_a_clean_refusal_and_the_server_lives(client):
    headers, begin = {"Content-Type": "application/json"}, time.monotonic()
    for path, body in CASES:
        answer = client.send("POST", path, body, headers)
        assert 400 <= answer.status < 500, (path, body[:200], answer)
        error = answer.json["error"]
        assert error["message"] and len(error["message"]) < 700 and error["type"], (path, body[:200])
        assert "Traceback" not in error["message"]
    assert len(CASES) > 150 and time.monotonic() - begin < 60
    assert client.get("/health").status == 200
    assert client.complete(prompt="a", max_tokens=3, temperature=0).status == 200
    assert client.chat("a", max_tokens=3, temperature=0).status == 200
    assert client.metric("mor_open_requests") == client.metric("mor_running_sequences") == 0


def test_what_a_message_holds_is_text_to_the_template(client):
    """Jinja within a message is not run."""
    content = "{{ 7 * 7 }}{% for a in range(9) %}x{% endfor %}"
    answer = client.chat(content, max_tokens=0).json
    assert answer["usage"]["prompt_tokens"] == len(f"[user] {content}\n[assistant] ")

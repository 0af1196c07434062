"""Chat templates are rendered as `transformers` renders them, within a second, and by nobody who can do harm."""

import json

import pytest
from live_server import TEMPLATE

from mor_jax.data.special_tokens import SpecialTokens
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.serve import render_chat
from mor_jax.serve.chat_request import parse_chat_request
from mor_jax.serve.chat_template import ChatTemplate, open_chat_template
from mor_jax.serve.http_errors import ApiError

MESSAGES = [{"role": "user", "content": "<b>é & \n"}, {"role": "assistant", "content": "yes"}]
TEMPLATES = {
    "whitespace": "  {% if true %}\nx\n  {% endif %}\n{{ bos_token }}\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "undefined": "{% if tools %}tools{% endif %}{{ nothing }}{{ messages[0].name }}{{ eos_token }}",
    "prompt": "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "time": "{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_transformers_gives(name):
    compiled = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template(TEMPLATES[name])
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (True, False):
        wanted = compiled.render(**variables, add_generation_prompt=prompt)
        assert render_chat.compile_template(TEMPLATES[name])(variables | {"add_generation_prompt": prompt}) == wanted


def test_templates_by_hand():
    render = render_chat.compile_template(TEMPLATES["json"])
    plain = '[{"role": "user", "content": "<b>é"}]'
    assert render({"messages": json.loads(plain)}).startswith(plain)  # no HTML escapes
    assert render_chat.compile_template(TEMPLATES["whitespace"])({"bos_token": "<s>"}) == "x\n<s>"
    assert render_chat.compile_template(TEMPLATES["loop controls"])({"messages": MESSAGES}) == MESSAGES[0]["content"]


def test_a_template_that_loops_or_eats_is_ended_and_another_text_is_rendered(monkeypatch):
    loops = "{% if messages[0].content == 'x' %}fine{% else %}{% for a in range(99999) %}{% for b in range(99999) %}"
    chat = ChatTemplate(loops + "{% endfor %}{% endfor %}{% endif %}", {})
    with pytest.raises(UserError, match="took more than 1 s"):
        chat.render([{"role": "user", "content": "y"}])
    assert chat.render([{"role": "user", "content": "x"}]) == "fine"
    chat.close()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ raise_exception.__globals__['os'] }}", "access to attribute '__globals__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * 5000000 }}", "more than 4194304 characters"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_what_a_template_may_not_do(template, words):
    lines = (json.dumps(value) for value in (template, {"messages": MESSAGES}))
    if words == "MemoryError":  # only the process of its own has a limit
        chat = ChatTemplate(template, {})
        with pytest.raises(UserError, match=words):
            chat.render(MESSAGES)
        chat.close()
    else:
        ready, answer = map(json.loads, render_chat.answers(lines, lambda seconds: None))
        assert ready == {} and words in answer["error"]


def _tokenizer(**files):
    return Tokenizer('{"kind": "bytes"}', special=SpecialTokens(256, (256,), files=files))


def test_the_models_own_template_is_found(caplog):
    named = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ eos_token }}!"}
    chat = open_chat_template(_tokenizer(**{"tokenizer_config.json": named}))
    assert chat is not None and chat.render(MESSAGES) == "<s><|endoftext|>!"
    chat.close()
    assert open_chat_template(_tokenizer()) is None
    several = {"chat_template": [{"name": "rag", "template": "x"}]}
    assert open_chat_template(_tokenizer(**{"tokenizer_config.json": several})) is None
    assert open_chat_template(_tokenizer(**{"chat_template.jinja": "{% for"})) is None


def _parse(**fields):
    return parse_chat_request(json.dumps({"messages": MESSAGES, **fields}).encode(), "tiny", 3)


def test_fields_of_a_chat():
    plain = _parse()
    assert (plain.max_tokens, plain.alternatives, plain.add_generation_prompt, plain.n) == (None, None, True, 1)
    assert plain.engine_requests([(1, 2)], (), 10)[0].max_tokens == 8
    assert _parse(max_tokens=3, max_completion_tokens=3).max_tokens == 3 and _parse(logprobs=True).alternatives == 0
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "seed": 1,
        "functions": None, "top_logprobs": 0, "logprobs": False, "chat_template": None, "presence_penalty": 0,
        "echo": False,
    }  # fmt: skip
    assert _parse(**neutral) == _parse(seed=1)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []}
    wanted = _parse(messages=[{"role": "user", "content": parts, "name": "n"}, answer])
    assert wanted.messages == (
        {"role": "user", "content": "a\nb", "name": "n"}, {"role": "assistant", "content": "c"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "must be a list of 1 to 4096 messages"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": ["hi"]}, "messages", 'messages[0]="hi" must be an object'),
        ({"messages": [{"content": "a"}]}, "messages", "messages[0].role=null is not one of system,"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", "is not one of"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", 'role="tool" is not one of'),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content=null must be a text or"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "messages", "name=3 must be a text"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "the model's own template is used"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "the model's own template is used"),
        ({"tools": [{"type": "function"}]}, "tools", "tools are not called"),
        ({"response_format": {"type": "json_object"}}, "response_format", "answers are plain text"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "disagree"),
        ({"logprobs": 3}, "logprobs", "logprobs=3 must be true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs=3 needs logprobs=true"),
        ({"n": 4}, "n", "n=4 for each of 1 prompts is outside 1..3"),
        ({"prompt": "a"}, None, 'unknown field "prompt"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_name_field_value_and_rule(fields, field, words):
    with pytest.raises(ApiError) as caught:
        _parse(**fields)
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and words in error["message"] and error["param"] == field


def test_the_tests_template_is_one():
    render = render_chat.compile_template(TEMPLATE)
    assert render({"messages": MESSAGES[:1], "add_generation_prompt": True}) == "[user] <b>é &\n[assistant] "

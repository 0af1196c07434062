"""A model whose logits are not finite: every way to ask it ends in an error, and no JSON holds NaN."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from live_server import MODEL, running, tiny_model

from mor_jax.cli import generate
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.infer.language_model import LanguageModel
from mor_jax.model.transformer import init_params
from mor_jax.serve.service import Service

BAD = 200
"""The token whose embedding, and so (tied) whose logit, is bad."""


def _model(value):
    params = jax.jit(lambda: init_params(MODEL, jax.random.key(1)))()
    spoilt = lambda leaf: leaf.at[BAD].set(value) if leaf.shape == (257, 16) else leaf  # noqa: E731
    return LanguageModel(MODEL, jax.tree.map(spoilt, params), Tokenizer.bytes_level())


@pytest.fixture(scope="module", params=[math.nan, math.inf, 3e38], ids=["nan", "inf", "overflow"])
def model(request):
    return _model(request.param)


@pytest.fixture(scope="module")
def client(model):
    with running(model) as client:
        yield client


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


FIELDS = ({"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 1, "top_k": 5}, {"show_depth": True})


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_request_ends_with_an_error(client, fields):
    answer = client.complete(prompt=["x", "y"], max_tokens=4, **fields)
    error = _strict(answer.body)["error"]
    assert answer.status == 500 and error["message"].startswith("the logits are not finite")
    assert (error["type"], error["code"]) == ("server_error", "logits_not_finite")


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_stream_ends_with_an_error_and_then_ends(client, fields):
    answer = client.complete(prompt="x", max_tokens=4, stream=True, **fields)
    events = [_strict(part.removeprefix("data: ")) for part in answer.body.decode().split("\n\n")[:-2]]
    assert answer.body.endswith(b"data: [DONE]\n\n") and len(events) == 1
    assert events[0]["error"]["code"] == "logits_not_finite"


def test_it_is_counted_and_the_server_goes_on(client):
    before = client.metric('mor_completions_total{finish="error"}')
    client.complete(prompt="x", max_tokens=4)
    assert client.metric('mor_completions_total{finish="error"}') == before + 1
    assert client.metric("mor_open_requests") == 0 and client.get("/health").status == 200


def test_a_python_caller_is_told(model):
    with pytest.raises(UserError, match="prompt 1, token 1: the logits are not finite"):
        model.generate("x", max_tokens=4)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_command_says_one_line_and_prints_no_completion(model, flags, monkeypatch, capsys):
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr("mor_jax.infer.language_model.load", lambda *_, **__: model)
    with pytest.raises(UserError, match="the logits are not finite"):
        generate.run(["folder", "--prompt", "x", "--max-tokens", "3", *flags])
    assert re.sub("^x", "", capsys.readouterr().out) == ""


@pytest.mark.parametrize("together", [False, True], ids=["as they come", "all in the step of the failure"])
def test_tokens_before_the_failure_are_sent_and_later_prompts_are_served(together, monkeypatch):
    """Only one request's sixth token is not finite: it alone ends, after the five before it."""
    from mor_jax.infer.engine import Engine

    step, seen, held = Engine.step, [], []

    def spoil(engine):
        tokens = step(engine)
        for i, token in enumerate(tokens):
            seen.append(token.request)
            if seen.count(seen[0]) == 6 and token.request == seen[0]:
                tokens[i] = token._replace(log_probability=math.nan)
        held.extend(tokens)
        if together and len(seen) < 6:
            return []
        tokens, held[:] = held[:], []
        return tokens

    with running(tiny_model()) as client, monkeypatch.context() as patched:
        patched.setattr(Engine, "step", spoil)
        events = client.complete(prompt="abc", max_tokens=40, temperature=0, stream=True, show_depth=True).events
        assert events[-1]["error"]["code"] == "logits_not_finite"
        assert sum(len(event["choices"][0]["tokens"]) for event in events[:-1]) == 5
        assert client.complete(prompt="abc", max_tokens=8, temperature=0).status == 200
        service = client.server.service
        assert isinstance(service, Service) and service._open == 0


def test_minus_infinity_is_no_failure():
    """Padded ids of a vocabulary have it, so that they are never drawn."""
    from mor_jax.infer.sampling import SamplingRows, sample

    rows = SamplingRows(jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.zeros(1, jnp.uint32))
    for logits, finite in (([0.0, -math.inf], True), ([0.0, math.nan], False), ([0.0, math.inf], False)):
        _, log_probability_E, _ = sample(jnp.array([logits]), rows, jnp.zeros(1, jnp.int32))
        assert bool(jnp.isfinite(log_probability_E[0])) == finite

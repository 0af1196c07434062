"""The official client against a real server: what it sends is taken, and what comes back is what it expects."""

import math

import jax
import pytest
from live_server import MODEL, NAME, TEMPLATE, running, tiny_model

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.language_model import LanguageModel
from mor_jax.model.transformer import init_params

openai = pytest.importorskip("openai")


def _client(port, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def client(model):
    with running(model) as server:
        yield _client(server.port)


def test_completions_and_usage(client, model):
    (expected,) = model.generate("Once", max_tokens=12)
    answer = client.completions.create(model=NAME, prompt="Once", max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, "length", 0)
    assert (answer.object, answer.model, choice.logprobs) == ("text_completion", NAME, None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)


def test_tokens_that_were_there_already_are_told(client):
    """Blocks of 8 tokens; the last token of a prompt is always computed, and all of them where the prompt is scored."""
    ask = lambda prompt, **more: client.completions.create(  # noqa: E731
        model=NAME, prompt=prompt, max_tokens=6, temperature=0, **more
    )
    cached = lambda answer: answer.usage.prompt_tokens_details.cached_tokens  # noqa: E731
    first, second = (ask("A sentence of 32 bytes, and then") for _ in range(2))
    assert (cached(first), cached(second)) == (0, 24) and first.choices[0].text == second.choices[0].text
    assert cached(ask("A sentence of 32 bytes, no more")) == 24 and cached(ask("A sentence of another kind")) == 8
    assert cached(ask("A sentence of 32 bytes, and then", echo=True, logprobs=1)) == 0
    assert cached(ask("A sentence of 32 bytes, and then", extra_body={"max_depth": 1})) == 0
    *_, last = ask("A sentence of 32 bytes, and then", stream=True, stream_options={"include_usage": True})
    assert cached(last) == 24


def test_several_prompts_and_token_ids(client):
    texts = client.completions.create(model=NAME, prompt=["one", "two"], max_tokens=5, temperature=0).choices
    tokens = client.completions.create(model=NAME, prompt=[list(b"one"), list(b"two")], max_tokens=5, temperature=0)
    assert [c.text for c in texts] == [c.text for c in tokens.choices] and [c.index for c in texts] == [0, 1]


def test_every_field_that_the_client_types(client):
    """All arguments of ``completions.create`` that do not ask for another answer."""
    answer = client.completions.create(
        model=NAME, prompt="Once", best_of=1, echo=False, frequency_penalty=0, logit_bias={}, max_tokens=3, n=1,
        presence_penalty=0, seed=2**63 - 1, stop=["\n\n"], stream=False, suffix=None, temperature=1, top_p=0.5,
        user="somebody", extra_body={"metadata": {"run": "1"}, "store": False, "service_tier": "auto", "top_k": -1},
        extra_headers={"X-Request-Id": "7"}, timeout=60,
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 3


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**40 + 3, -5, -(2**63)])
def test_a_seed_of_any_size_repeats_itself(client, seed):
    ask = lambda: client.completions.create(model=NAME, prompt="a", max_tokens=8, seed=seed).choices[0].text  # noqa: E731
    assert ask() == ask()


def test_top_p_0_is_greedy(client):
    ask = lambda **fields: client.completions.create(model=NAME, prompt="a", max_tokens=8, **fields).choices[0].text  # noqa: E731
    assert ask(top_p=0) == ask(temperature=0) == ask(top_p=0, seed=-1)


@pytest.mark.parametrize("obfuscation", [True, False])
def test_streaming_with_usage(client, model, obfuscation):
    (expected,) = model.generate("Once", max_tokens=12)
    options = {"include_usage": True, "include_obfuscation": obfuscation}
    stream = client.completions.create(
        model=NAME, prompt="Once", max_tokens=12, temperature=0, stream=True, stream_options=options
    )
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert [part.usage for part in parts] == [None] * len(parts) and len(parts) > 1
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.total_tokens == 16


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).owned_by == "mor_jax"


def test_errors_arrive_as_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="n=200 for each of 1 prompts") as caught:
        client.completions.create(model=NAME, prompt="a", n=200)
    assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match=r"logprobs=21 is outside 0\.\.20"):
        client.completions.create(model=NAME, prompt="a", logprobs=21)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"


def _told(logprobs):
    return list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True))


def test_a_prompt_is_repeated_with_its_logprobs(client):
    ask = lambda **fields: client.completions.create(model=NAME, prompt="Once", temperature=0, logprobs=2, **fields)  # noqa: E731
    after, whole, alone = ask(max_tokens=5), ask(max_tokens=5, echo=True), ask(max_tokens=0, echo=True)
    text, found = after.choices[0].text, whole.choices[0].logprobs
    assert whole.choices[0].text == "Once" + text and alone.choices[0].text == "Once"
    assert found.tokens[:4] == list("Once") and found.text_offset[:5] == [0, 1, 2, 3, 4]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert _told(alone.choices[0].logprobs) == _told(found)[:4]
    assert [t[:2] for t in _told(found)[4:]] == [t[:2] for t in _told(after.choices[0].logprobs)]
    for token, value, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == value and 2 <= len(top) <= 3 and max(top.values()) < 0
    assert (alone.usage.completion_tokens, alone.choices[0].finish_reason) == (0, "length")
    parts = list(ask(max_tokens=5, echo=True, stream=True))
    assert "".join(part.choices[0].text for part in parts) == "Once" + text
    assert [told for part in parts for told in _told(part.choices[0].logprobs)] == _told(found)


@pytest.fixture(scope="module")
def chat():
    model = tiny_model(TEMPLATE)
    with running(model) as server:
        yield _client(server.port), model


MESSAGES = ({"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi"})
TEXT = "[system] Be kind.\n[user] Hi\n[assistant] "


def test_a_chat_whole_and_streamed(chat):
    client, model = chat
    (expected,) = model.generate(TEXT, max_tokens=12)
    fields = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**fields, top_logprobs=2)
    (choice,) = answer.choices
    assert (answer.object, choice.message.role, choice.message.content) == (
        "chat.completion",
        "assistant",
        expected.text,
    )
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(TEXT)
    told = choice.logprobs.content
    assert [token.logprob for token in told] == pytest.approx(expected.log_probabilities, abs=1e-4)
    assert [bytes(token.bytes) for token in told] == [bytes([t]) for t in expected.tokens]
    assert all(token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 2 for token in told)

    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    assert parts[-1].choices[0].finish_reason == "length" and last.usage.total_tokens == len(TEXT) + 12
    assert [t.logprob for part in parts for t in part.choices[0].logprobs.content] == [t.logprob for t in told]


def test_a_chat_that_the_template_refuses_or_that_is_none(chat, client):
    with pytest.raises(openai.BadRequestError, match="only the first message may be of the system") as caught:
        chat[0].chat.completions.create(model=NAME, messages=MESSAGES[::-1])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="has no chat template") as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES)
    assert caught.value.code == "no_chat_template"


@pytest.fixture(scope="module")
def broken():
    params = jax.jit(lambda: init_params(MODEL, jax.random.key(1)))()
    spoilt = jax.tree.map(lambda leaf: leaf.at[200].set(math.nan) if leaf.shape == (257, 16) else leaf, params)
    with running(LanguageModel(MODEL, spoilt, Tokenizer.bytes_level())) as server:
        yield _client(server.port)


def test_logits_that_are_not_finite_are_a_server_error(broken):
    with pytest.raises(openai.InternalServerError, match="the logits are not finite") as caught:
        broken.completions.create(model=NAME, prompt="a", max_tokens=3)
    assert caught.value.code == "logits_not_finite"


def test_in_a_stream_they_are_an_api_error(broken):
    with pytest.raises(openai.APIError, match="the logits are not finite"):
        list(broken.completions.create(model=NAME, prompt="a", max_tokens=3, stream=True))

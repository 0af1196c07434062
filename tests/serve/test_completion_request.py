"""What a body of POST /v1/completions may hold, and what every mistake in it is told."""

import json

import pytest

from mor_jax.infer.sampling import Sampling
from mor_jax.serve.completion_request import CompletionRequest, parse_completion_request
from mor_jax.serve.http_errors import ApiError


def _parse(body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_completion_request(raw, "tiny", max_prompts=3)


def test_openai_defaults():
    wanted = _parse({"model": "tiny", "prompt": "text", "seed": 1})
    assert wanted == CompletionRequest(prompts=("text",), max_tokens=16, sampling=Sampling(1.0, seed=1))
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "stream",
        "n",
        "logprobs",
        "logit_bias",
        "echo",
        "min_tokens",
    )
    nothing = dict.fromkeys(names)
    assert _parse({"prompt": "text", "seed": 1, **nothing}) == wanted


def test_every_field():
    wanted = _parse({
        "prompt": ["a", [1, 2]], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4, "seed": 5, "n": 1,
        "stop": "x", "stream": True, "stream_options": {"include_usage": True}, "max_depth": 2, "show_depth": True,
        "user": "somebody", "echo": True, "best_of": 1, "presence_penalty": 0.0, "suffix": "", "logprobs": 2,
        "logit_bias": {"7": -100, "30": 1.5}, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [4],
    })  # fmt: skip
    assert wanted == CompletionRequest(
        prompts=("a", (1, 2)), max_tokens=3, sampling=Sampling(0, 4, 0.5, 5, ((7, -100), (30, 1.5))), stop=("x",),
        max_depth=2, stream=True, include_usage=True, show_depth=True, echo=True, alternatives=2, min_tokens=2,
        ignore_eos=True, stop_token_ids=(4,),
    )  # fmt: skip


@pytest.mark.parametrize("body", [{}, {"seed": None}, {"seed": -1}])
def test_without_a_seed_every_request_draws_anew(body):
    assert len({_parse({"prompt": "a", **body}).sampling.seed for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("seed", "folded"),
    [
        (0, 0),
        (2**32 - 1, 2**32 - 1),
        (2**32, 1),
        (2**40, 2**8),
        (2**40 + 5, 2**8 + 5),
        (2**63 - 1, 2**31),
        (-2, 1),
        (-(2**63), 2**31),
    ],
)
def test_any_signed_64_bit_seed_is_folded(seed, folded):
    assert _parse({"prompt": "a", "seed": seed}).sampling.seed == folded


def test_top_p_0_is_the_most_likely_token():
    for zero in (0, 0.0, 1e-400):
        assert _parse({"prompt": "a", "top_p": zero, "seed": 3}).sampling == Sampling(0.0, seed=3)


def test_what_cannot_change_a_completion_is_accepted():
    plain = _parse({"prompt": "a", "seed": 1})
    ignored = {
        "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": True, "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "request_id": "r", "priority": 3,
    }  # fmt: skip
    neutral = {
        "top_k": -1, "repetition_penalty": 1.0, "length_penalty": 1, "min_p": 0.0, "typical_p": 1.0,
        "use_beam_search": False, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "best_of": None,
        "include_stop_str_in_output": False, "skip_special_tokens": True, "prompt_logprobs": None, "stop": [],
    }  # fmt: skip
    for name, value in {**ignored, **neutral}.items():
        assert _parse({"prompt": "a", "seed": 1, name: value}) == plain, name
    assert _parse({"prompt": "a", "seed": 1, **ignored, **neutral}) == plain


@pytest.mark.parametrize("usage", [True, False, None])
@pytest.mark.parametrize("obfuscation", [True, False, None])
def test_stream_options_of_the_official_client(usage, obfuscation):
    options = {"include_usage": usage, "include_obfuscation": obfuscation, "continuous_usage_stats": False}
    wanted = _parse({"prompt": "a", "stream": True, "stream_options": options})
    assert wanted.stream and wanted.include_usage == bool(usage)


def test_completions_of_one_request_draw_apart():
    wanted = _parse({"prompt": ["a"], "n": 3, "seed": 2**32 - 1, "best_of": 3})
    requests = wanted.engine_requests([(1,)], (9,), 8)
    assert [request.sampling.seed for request in requests] == [2**32 - 1, 0, 1]


def test_what_ends_a_completion():
    stops = lambda **fields: _parse({"prompt": "a", **fields}).engine_requests([(1,)], (9,), 8)[0].stop_tokens  # noqa: E731
    assert stops() == (9,) and stops(ignore_eos=True) == ()
    assert stops(stop_token_ids=[3, 9]) == (9, 3) and stops(stop_token_ids=[3], ignore_eos=True) == (3,)


def test_only_a_repeated_prompt_is_scored():
    scored = lambda **fields: _parse({"prompt": "a", **fields}).engine_requests([(1,)], (), 8)[0].score_prompt  # noqa: E731
    assert [scored(echo=True, logprobs=0), scored(echo=True), scored(logprobs=3)] == [True, False, False]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (b"", None, "the body is not JSON"),
        (b'{"prompt": ', None, "the body is not JSON"),
        (b"\xff\xfe\x00", None, "the body is not JSON"),
        (b"[" * 100_000, None, "the body is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', None, "NaN is no JSON number"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", None, "an integer of more than 40 digits"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "2": 3, "2": 3}}', None, '"2" stands there more than once'),
        ([1], None, "must be a JSON object, not list"),
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 7}, "prompt", "prompt=7 must be a text"),
        ({"prompt": []}, "prompt", "prompt=[] must be a text"),
        ({"prompt": ["a", 1]}, "prompt", "1 is neither a text nor a list of token ids"),
        ({"prompt": [True]}, "prompt", "true is neither"),
        ({"prompt": [[]]}, "prompt", "[] is neither"),
        ({"prompt": list("abcd")}, "prompt", "holds 4 prompts, more than 3"),
        (b'{"prompt": "a\\ud800"}', "prompt", "character 1 is half of a surrogate pair"),
        (b'{"prompt": "a", "\\ud800": 1}', None, 'unknown field "\\ud800"'),
        ({"prompt": "a", "max_token": 3}, None, "did you mean 'max_tokens'?"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens", 'max_tokens="3" must be an integer'),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens=true must be an integer"),
        ({"prompt": "a", "max_tokens": 3.5}, "max_tokens", "max_tokens=3.5 must be an integer"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "must be a number"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature=-1 is outside [0, 100]"),
        ({"prompt": "a", "top_p": -0.1}, "top_p", "top_p=-0.1 is outside [0, 1]"),
        ({"prompt": "a", "top_p": 1.1}, "top_p", "top_p=1.1 is outside [0, 1]"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", "temperature=inf is outside"),
        ({"prompt": "a", "top_k": -2}, "top_k", "top_k=-2 must be a count"),
        ({"prompt": "a", "seed": 2**63}, "seed", "seed=9223372036854775808 is outside [-2^63, 2^63)"),
        ({"prompt": "a", "seed": -(2**63) - 1}, "seed", "seed=-9223372036854775809 is outside"),
        ({"prompt": "a", "seed": 1.5}, "seed", "seed=1.5 must be an integer"),
        ({"prompt": "a", "stop": 3}, "stop", "stop=3 must be a text or a list of texts"),
        ({"prompt": "a", "stop": ["x"] * 5}, "stop", "at most 4 texts"),
        ({"prompt": "a", "stop": ""}, "stop", "1 to 256 characters"),
        ({"prompt": "a", "stream": 1}, "stream", "stream=1 must be true or false"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream_options needs stream=true"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options", "may hold only include_usage,"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": 1}}, "include_obfuscation", "true"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "stream_options.continuous_usage_stats=true is not served",
        ),
        ({"prompt": "a", "n": 4}, "n", "n=4 for each of 1 prompts is outside 1..3 completions"),
        ({"prompt": ["a", "b"], "n": 2}, "n", "n=2 for each of 2 prompts is outside 1..3"),
        ({"prompt": "a", "n": 10**30}, "n", "n=1000000"),
        ({"prompt": "a", "n": 0}, "n", "n=0 for"),
        ({"prompt": "a", "n": True}, "n", "n=true must be an integer"),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of=2 must be n=1"),
        ({"prompt": "a", "echo": 0}, "echo", "echo=0 must be true or false"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs=true must be an integer"),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens", "min_tokens=-1 must not be negative"),
        ({"prompt": "a", "presence_penalty": 0.1}, "presence_penalty", "presence_penalty=0.1 is not served, only 0"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias", "must be an object of at most 300"),
        ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
        ({"prompt": "a", "logit_bias": {"01": 2}}, "logit_bias", '"01" is not a token id'),
        ({"prompt": "a", "logit_bias": {"\u0661": 2}}, "logit_bias", "is not a token id"),
        ({"prompt": "a", "logit_bias": {"1": None}}, "logit_bias", "1: null is not a number"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "logit_bias={1: 101.0} is outside [-100, 100]"),
        (b'{"prompt": "a", "logit_bias": {"1": 1e999}}', "logit_bias", "is outside [-100, 100]"),
        ({"prompt": "a", "repetition_penalty": 1.1}, "repetition_penalty", "only 1: the model's probabilities"),
        ({"prompt": "a", "min_p": 0.1}, "min_p", "min_p=0.1 is not served, only 0"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "ignore_eos=1 must be true or false"),
        ({"prompt": "a", "stop_token_ids": ["3"]}, "stop_token_ids", "must be a list of token ids"),
        ({"prompt": "a", "messages": []}, None, 'unknown field "messages"'),
        ({"prompt": "a", "skip_special_tokens": False}, "skip_special_tokens", "only true"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_name_field_value_and_rule(body, field, words):
    with pytest.raises(ApiError) as caught:
        _parse(body)
    assert caught.value.status == 400 and words in caught.value.message and len(caught.value.message) < 400
    error = caught.value.body()["error"]
    assert error == {
        "message": caught.value.message, "type": "invalid_request_error", "param": field, "code": None
    }  # fmt: skip
    assert json.loads(bytes(caught.value.response().body))["error"] == error


def test_a_value_of_any_depth_is_refused():
    """What the parser can just read may be too deep to be shown."""
    for depth in range(800, 1100):
        with pytest.raises(ApiError):
            _parse(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")


def test_another_model_is_not_found():
    with pytest.raises(ApiError, match="model=\"large\" is not served here; the model is 'tiny'") as caught:
        _parse({"model": "large", "prompt": "a"})
    assert caught.value.status == 404 and caught.value.code == "model_not_found"

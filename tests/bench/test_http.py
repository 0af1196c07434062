"""``mor bench http`` against a small server that streams words, or misbehaves: what it sends, counts and refuses."""

import json
import math
import time
from collections import Counter
from random import Random
from typing import Any

import pytest
from openai_server import GAP, NAME, WordServer, word_server

from mor_jax.bench.http_client import HttpClient, Reply
from mor_jax.bench.http_load import bench_http, put_load
from mor_jax.bench.http_prompts import arrivals, draw, fingerprint
from mor_jax.bench.http_report import measurement_text, summarize_replies
from mor_jax.bench.http_settings import HttpSettings, parse_lengths
from mor_jax.cli import main
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError

SMALL = {"requests": 12, "warmup": 1, "prompt_length": "uniform:3:9", "output_length": "5"}


def _measure(server, **settings):
    options = HttpSettings(**{**SMALL, "concurrency": (3,), **settings})
    record = bench_http(server.url, options, model=None, key="", command=["mor"], done=lambda _: None)
    return json.loads(json.dumps(record, allow_nan=False))["measurements"]


def test_lengths_follow_the_distribution_that_is_named():
    rng = Random(0)
    assert {parse_lengths("7", "x")(rng) for _ in range(9)} == {7}
    counts = Counter(map(parse_lengths("uniform:3:6", "x"), [rng] * 4000))
    assert counts.keys() == {3, 4, 5, 6} and all(abs(n - 1000) < 120 for n in counts.values())
    normal = list(map(parse_lengths("normal:100:20", "x"), [rng] * 4000))
    mean = sum(normal) / 4000
    assert abs(mean - 100) < 1.5 and abs(math.sqrt(sum((n - mean) ** 2 for n in normal) / 4000) - 20) < 1
    assert min(map(parse_lengths("normal:1:50", "x"), [rng] * 100)) == 1


@pytest.mark.parametrize(
    "text", ["", "many", "0", "1.5", "uniform:3", "uniform:6:3", "uniform:0:3", "normal:9:-1", "normal:nan:1",
             "zipf:1:2", "1:2", "normal:inf:1", "9999999"],
)  # fmt: skip
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"^prompt_length="):
        HttpSettings(prompt_length=text)


def test_prompts_are_the_same_everywhere_and_never_twice():
    settings = HttpSettings(requests=20, prompt_length="uniform:5:30", output_length="normal:9:3", shared_prefix=4)
    drafts = draw(settings, 0)
    # of any Python and machine: results with equal fingerprints answered the same prompts
    assert fingerprint(drafts) == "0bfa316c17d6745d0d18860475a756c0d235bb3650f756286d719cd5810fafa3"
    assert draw(settings, 0) == drafts and len({d.prompt for n in (-1, 0, 1) for d in draw(settings, n)}) == 44
    assert len({tuple(d.prompt.split()[:4]) for d in drafts}) == 1
    assert all(9 <= len(d.prompt.split()) <= 34 and d.max_tokens > 0 for d in drafts)


def test_a_tokenizer_makes_lengths_tokens():
    drafts = draw(HttpSettings(requests=9, prompt_length="40"), 0, Tokenizer.bytes_level())
    assert all(40 - len(" through") < len(d.prompt) <= 40 for d in drafts)


def test_arrivals_are_those_of_a_poisson_process():
    times = arrivals(HttpSettings(requests=4000), 0, rate=5)
    gaps = [b - a for a, b in zip([0, *times], times, strict=False)]
    assert abs(sum(gaps) / 4000 - 0.2) < 0.01 and min(gaps) >= 0
    assert abs(sum(gap > 0.2 for gap in gaps) / 4000 - math.exp(-1)) < 0.025


def test_a_closed_loop_keeps_so_many_in_flight():
    with word_server() as server:
        (found,) = _measure(server)
        prompts = [d.prompt for n in (-1, 0) for d in draw(HttpSettings(**SMALL), n)]
        assert sorted(body["prompt"] for body in server.asked) == sorted(prompts)
        first = {name: value for name, value in server.asked[0].items() if name != "prompt"}
        assert first == {
            "model": NAME, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0.0, "ignore_eos": True,
        }  # fmt: skip
        assert server.most == 3 and server.connections == 1 + 3  # the check's, and one of every thread
    assert (found["concurrency"], found["requests"], found["completed"], found["errors"]) == (3, 12, 12, {})
    assert found["output_tokens"] == 60 and found["tokens_per_event"] == 1 and found["ended_early"] == 0
    assert found["prompt_tokens"] == sum(len(prompt.split()) for prompt in prompts[1:])
    assert found["output_tokens_per_second"] == pytest.approx(60 / found["seconds"])
    assert found["seconds"] >= 4 * 5 * GAP and 2 < found["mean_in_flight"] <= 3
    # the server sleeps before every word
    assert found["time_to_first_token_seconds"]["p50"] >= GAP <= found["time_between_events_seconds"]["p50"]
    assert found["time_per_output_token_seconds"]["mean"] >= GAP
    assert found["end_to_end_seconds"]["mean"] >= 5 * GAP and found["cached_prompt_tokens"] is None


def test_an_open_loop_waits_for_nobody():
    with word_server() as server:
        found, slower = _measure(server, concurrency=(), rates=(400.0, 40.0), requests=20)
        assert server.most > 3
    settings = HttpSettings(**{**SMALL, "requests": 20})
    for number, (result, rate) in enumerate(((found, 400.0), (slower, 40.0))):
        sent = [row["sent"] for row in result["replies"]]
        due = arrivals(settings, number, rate)
        assert result["rate"] == rate and all(s >= d for s, d in zip(sent, due, strict=True))
        assert result["send_delay_seconds"]["p50"] < 0.1
    assert "open loop, 400 requests/s: 20 of 20" in measurement_text(found)
    assert "sent late by" in measurement_text(found)


def test_after_so_many_seconds_no_more_are_sent():
    with word_server() as server:
        closed, opened = _measure(server, rates=(50.0,), requests=400, seconds=0.3)
    assert 3 <= closed["requests"] == closed["completed"] < 100
    expected = sum(t <= 0.3 for t in arrivals(HttpSettings(requests=400), 1, 50.0))
    assert opened["requests"] == expected


@pytest.mark.parametrize(
    ("behaviour", "kind", "count", "message"),
    [
        ("busy", "http_429", 3, "HTTP 429: the queue is full"),
        ("cut", "cut", 12, "the stream ended before its completion did"),
        ("fails", "error_event", 12, "out of memory"),
        ("hangs", "timeout", 12, "timed out"),
    ],
)
def test_failures_are_counted_by_kind(behaviour, kind, count, message):
    with word_server(behaviour) as server:
        (found,) = _measure(server, concurrency=(12,), timeout=0.5 if behaviour == "hangs" else 30)
    assert found["errors"] == {kind: {"count": count, "example": message}}
    assert found["completed"] == 12 - count and len(found["replies"]) == 12
    assert f"failed: {count} x {kind}" in measurement_text(found)
    if count == 12:
        assert found["end_to_end_seconds"] is None and found["output_tokens_per_second"] == 0


def test_what_servers_may_do_is_no_failure():
    with word_server("restless") as server:  # closes a kept connection: the request is sent again on a new one
        (found,) = _measure(server, concurrency=(1,), warmup=3)
        assert found["completed"] == 12 and len(server.asked) == 3 + 12 + 1
    with word_server("short") as server:
        (found,) = _measure(server)
        assert found["ended_early"] == 12 and "12 completions are shorter than asked" in measurement_text(found)
    with word_server("cache") as server:
        (found,) = _measure(server)
        assert found["cached_prompt_tokens"] == 12 and "(12 cached)" in measurement_text(found)


def test_latencies_count_from_when_a_request_was_due():
    late = Reply(due=1.0, sent=1.5, asked=3, end=4.0, texts=[2.0, 3.0, 4.0], prompt_tokens=7, output_tokens=5)
    lost = Reply(due=1.0, sent=1.0, asked=3, end=6.0, error="timeout", detail="timed out")
    found = summarize_replies([late, lost], begin=1.0)
    assert (found["seconds"], found["requests"], found["completed"]) == (5.0, 2, 1)
    assert found["time_to_first_token_seconds"]["mean"] == 1.0 and found["end_to_end_seconds"]["p99"] == 3.0
    assert found["time_per_output_token_seconds"]["p50"] == 0.5  # 2 s for the four tokens after the first
    assert found["time_between_events_seconds"]["p90"] == 1.0 and found["tokens_per_event"] == pytest.approx(5 / 3)
    assert (found["requests_per_second"], found["input_tokens_per_second"]) == (0.2, 1.4)
    assert found["send_delay_seconds"]["mean"] == 0.25 and found["mean_in_flight"] == 1.5
    assert summarize_replies([], begin=1.0)["requests_per_second"] == 0


@pytest.mark.parametrize(
    ("behaviour", "model", "message"),
    [
        ("", "wrods", r"model 'wrods': HTTP 404: The model wrods does not exist\. \(it has words\); did you mean 'wor"),
        ("whole", None, "the answer is application/json, not text/event-stream: it does not stream"),
        ("two models", None, r"has 2 models: choose one by --model \(words, others\)"),
        ("no models", None, "/v1/models: HTTP 404: no server of OpenAI's form, or name its --model"),
        ("no models", "other", "model 'other': HTTP 404: The model other does not exist"),
        ("key", None, "HTTP 401: it wants a key, which is taken from OPENAI_API_KEY"),
        ("no usage", None, "sends no `usage` with a stream: give the model's --tokenizer"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(behaviour, model, message):
    with word_server(behaviour) as server, pytest.raises(UserError, match=message):
        bench_http(server.url, HttpSettings(**SMALL), model=model, key="", command=[], done=lambda _: None)


def test_without_usage_a_tokenizer_counts(tmp_path):
    Tokenizer.bytes_level().save(tmp_path / "tokenizer.json")
    with word_server("no usage") as server:
        (found,) = _measure(server, tokenizer=tmp_path / "tokenizer.json", prompt_length="20")
        assert found["prompt_tokens"] == sum(len(body["prompt"]) for body in server.asked[1:])
    assert found["output_tokens"] == 12 * len(" word") * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached: Connection refused"),
        (["http://127.0.0.1:1/v1"], "http://127.0.0.1:1 cannot be reached: Connection refused"),
        (["localhost:8000"], "URL 'localhost:8000' is not like http://HOST:PORT"),
        (["http://a:b"], "URL 'http://a:b' is not like http://HOST:PORT"),
        (["ftp://a"], "URL 'ftp://a' is not like http://HOST:PORT"),
        (["http://" + "a" * 70], "cannot be reached"),
        (["http://a", "--concurrency", "0"], "concurrency=(0,) must be positive"),
        (["http://a", "--rates", "-1"], "rates=(-1.0,) must be positive and finite"),
        (["http://a", "--warmup", "0"], "warmup=0 must be positive"),
        (["http://a", "--extra-body", "[1]"], "extra_body='[1]' is not a JSON object"),
        (["http://a", "--extra-body", "{"], "extra_body='{' is not JSON"),
        (["http://a", "--extra-body", '{"stream": false}'], "extra_body names stream, which the benchmark sets itself"),
        (["http://a", "--tokenizer", "nowhere.json"], "nowhere.json: not a readable tokenizer file"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert main(["bench", "http", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


class _Interrupted(list[float]):
    """Times of which the fourth is never reached: Ctrl-C comes while three requests run."""

    def __init__(self, server: WordServer) -> None:
        self.server = server

    def __getitem__(self, index: Any) -> Any:
        if index < 3:
            return 0.0
        while self.server.running < 3:
            time.sleep(0.01)
        raise KeyboardInterrupt


def test_ctrl_c_waits_for_nobody():
    with word_server("hangs") as server:
        client = HttpClient(server.url, "", 60)
        body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 2}).encode()
        assert client.complete(body, 2).error == ""
        due, begin = _Interrupted(server), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            put_load(client, [(body, 2)] * 9, due=due, at_once=1, seconds=None)
        assert time.monotonic() - begin < 20  # the server would take 60 s

"""A real server on the loopback: what it answers, whom it refuses, and that nothing stays behind."""

import dataclasses
import json
import logging
import socket
import threading
import time

import pytest
from live_server import ENGINE, NAME, running, tiny_model

from mor_jax.errors import UserError
from mor_jax.infer.compilations import compilations
from mor_jax.infer.engine import Engine
from mor_jax.serve.server import bind
from mor_jax.serve.server_options import ServeOptions


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def client(model):
    with running(model, max_request_bytes=4000, read_seconds=2.0, write_seconds=1.0) as client:
        yield client


def _post(path, body, kind="application/json"):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _connect(client):
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    connection.settimeout(30)
    return connection


def _rest(connection):
    received = b""
    while part := connection.recv(4096):
        received += part
    return received


def _wait(condition, seconds=30.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def _slow_steps(monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.1), step(engine))[1])


def _idle(client):
    """Nothing runs or waits, and no page is held."""
    names = ("mor_running_sequences", "mor_waiting_sequences", "mor_pages_used", "mor_open_requests")
    return all(client.metric(name) == 0 for name in names)


def test_an_answer_is_what_the_model_generates(client, model):
    (expected,) = model.generate("Once", max_tokens=12, temperature=1.0, top_k=20, seed=3)
    fields = {"prompt": "Once", "max_tokens": 12, "temperature": 1.0, "top_k": 20, "seed": 3, "show_depth": True}
    before = compilations()
    answer = client.complete(**fields, model=NAME).json
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text and choice["finish_reason"] == "length" == expected.finish
    assert [token["id"] for token in choice["tokens"]] == expected.tokens
    assert [token["depth"] for token in choice["tokens"]] == expected.depths
    assert "".join(token["text"] for token in choice["tokens"]) == expected.text
    assert [token["logprob"] for token in choice["tokens"]] == pytest.approx(expected.log_probabilities, abs=1e-4)
    depth = round(sum(expected.depths) / 12, 4)
    counts = {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16, "mean_depth": depth}
    assert answer["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)

    events = client.complete(**fields, stream=True, stream_options={"include_usage": True}).events
    assert events.pop() | {"id": 0, "created": 0} == {
        "id": 0, "object": "text_completion", "created": 0, "model": NAME, "choices": [], "usage": answer["usage"],
    }  # fmt: skip
    assert "".join(event["choices"][0]["text"] for event in events) == expected.text
    streamed = [token for event in events for token in event["choices"][0]["tokens"]]
    assert streamed == choice["tokens"] and len(events) > 1
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert compilations() == before  # a warm server compiles nothing


def test_several_prompts_texts_and_tokens(client, model):
    expected = model.generate(["one", "three"], max_tokens=7)
    prompt = ["one", list(b"three"), "one", ""]
    choices = client.complete(prompt=prompt, max_tokens=7, temperature=0).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices[:3]] == [expected[i].text for i in (0, 1, 0)]
    events = client.complete(prompt=prompt, max_tokens=7, temperature=0, stream=True).events
    texts = [""] * 4
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in choices]
    assert client.complete(prompt=list(b"one"), max_tokens=7, temperature=0).json["choices"][0] == choices[0]


def test_a_stop_string_ends_it_and_frees_its_place(client, model):
    (whole,) = model.generate("stop here", max_tokens=60, temperature=1.0, seed=1)
    stop = whole.text[4]
    fields = {"prompt": "stop here", "max_tokens": 60, "seed": 1, "stop": ["never", stop]}
    (choice,) = client.complete(**fields).json["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == whole.text[: whole.text.index(stop)]
    _wait(lambda: _idle(client))


def test_a_budget_of_passes_holds(client):
    (choice,) = client.complete(prompt="deep", max_tokens=20, max_depth=1, show_depth=True).json["choices"]
    assert {token["depth"] for token in choice["tokens"]} == {1}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"prompt": "x" * 90, "max_tokens": 20}, "prompt", "exceed max_length=96"),
        ({"prompt": [5, 257]}, "prompt", "prompt token 257 is outside 0..256"),
        ({"prompt": [-1]}, "prompt", "prompt token -1 is outside"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens=-1 must not be negative"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens", "min_tokens=17 is outside 0..max_tokens=16"),
        ({"prompt": "x", "stop_token_ids": [257]}, "stop_token_ids", "stop_tokens: 257 is outside 0..256"),
        ({"prompt": "x", "stop_token_ids": [*range(8)]}, "stop_token_ids", "holds 9 tokens, more than 8"),
        ({"prompt": "x", "logit_bias": {"257": 1}}, "logit_bias", "logit_bias={257: ...} is outside 0..256"),
        ({"prompt": "x", "logprobs": -1}, "logprobs", "logprobs=-1 is outside 0..20"),
        ({"prompt": "x", "max_depth": 0}, "max_depth", "max_depth=0 must be at least 1"),
        ({"prompt": "x", "n": 20}, "n", "n=20 for each of 1 prompts"),
    ],
)
def test_what_cannot_be_served_is_refused(client, fields, field, words):
    answer = client.complete(**fields)
    error = answer.json["error"]
    assert answer.status == 400 and words in error["message"] and error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("POST", "/v1/completions", b"{", {"Content-Type": "application/json"}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415, "must be 'application/json'"),
        ("POST", "/v1/completions", b"x" * 9999, {"Content-Type": "application/json; charset=utf-8"}, 413, "4000"),
        ("POST", "/v1/completions", b"x" * 500_000, {"Content-Type": "application/json"}, 413, "max_request_bytes"),
        ("GET", "/v1/completions", None, {}, 405, "Method Not Allowed"),
        ("POST", "/v1/chat/completions", b"{}", {}, 400, "has no chat template"),
        ("GET", "/v1/models/large", None, {}, 404, "the model is 'tiny'"),
        ("GET", "/v1/models", None, {"Host": "attacker.example:80"}, 421, "Host='attacker.example:80' is not known"),
    ],
)
def test_other_mistakes_have_the_same_form(client, method, path, body, headers, status, words):
    answer = client.send(method, path, body, headers)
    assert answer.status == status and words in answer.json["error"]["message"]


def test_names_of_the_host_know_no_case(model):
    with running(model, allowed_hosts=("Demo.Example",)) as client:
        for host, status in (("demo.example", 200), ("DEMO.example:80", 200), ("other.example", 421)):
            assert client.send("GET", "/health", None, {"Host": host}).status == status


def test_models_health_and_metrics(client):
    (model,) = client.get("/v1/models").json["data"]
    assert model["id"] == NAME and model == client.get(f"/v1/models/{NAME}").json
    assert (client.get("/health").status, client.get("/health").json) == (200, {"status": "ok"})
    tokens, firsts = client.metric("mor_generated_tokens_total"), client.metric("mor_time_to_first_token_seconds_count")
    client.complete(prompt="count", max_tokens=9, temperature=0)  # a drawn token may be the one that ends a text
    assert client.metric("mor_generated_tokens_total") == tokens + 9 == client.metric("mor_tokens_by_depth_total")
    assert client.metric("mor_time_to_first_token_seconds_count") == firsts + 1
    assert 1 <= client.metric("mor_mean_depth") <= 3
    _wait(lambda: client.metric("mor_block_slots_used_total") >= 9)  # the engine's own figures may be a little old
    assert client.metric("mor_pages") > 0
    again = {"prompt": "twice the same words", "max_tokens": 2, "temperature": 0}  # 20 tokens in blocks of 8
    hits, cached = (client.metric(f"mor_{name}_total") for name in ("prefix_hits", "cached_prompt_tokens"))
    answers = [client.complete(**again).json for _ in range(2)]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 16]
    assert answers[0]["choices"] == answers[1]["choices"]
    _wait(lambda: client.metric("mor_prefix_hits_total") == hits + 1)
    assert client.metric("mor_cached_prompt_tokens_total") == cached + 16
    _wait(lambda: client.metric("mor_pages_used") == 0)
    assert client.metric("mor_pages_kept") > 0
    assert 'mor_requests_total{path="/v1/completions",status="200"}' in client.get("/metrics").body.decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_slots_and_pages(client, stream, monkeypatch):
    _slow_steps(monkeypatch)
    cancelled = 'mor_completions_total{finish="cancelled"}'
    before = client.metric(cancelled)
    # greedy: one of six drawn completions may end by itself before the client leaves
    fields = {"prompt": ["gone"] * 6, "max_tokens": 90, "temperature": 0, "stream": stream}
    body = json.dumps(fields).encode()
    with _connect(client) as connection:
        connection.sendall(_post("/v1/completions", body))
        if stream:
            assert b"200 OK" in connection.recv(100)
        else:
            _wait(lambda: client.metric("mor_running_sequences") > 0)
    _wait(lambda: _idle(client))
    assert client.metric(cancelled) == before + 6


def test_who_does_not_send_is_cut_off(client):
    with _connect(client) as silent, _connect(client) as slow, _connect(client) as halfway:
        slow.sendall(b"GET /health HTTP/1.1\r\nHo")
        halfway.sendall(_post("/v1/completions", b"{" * 100)[:-50])
        assert silent.recv(100) == b"" and slow.recv(100) == b""
        answer = _rest(halfway)
        assert answer.startswith(b"HTTP/1.1 408") and b"read_seconds=2" in answer


def test_who_does_not_read_is_cut_off(client):
    with _connect(client) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pages = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500_000
        with pytest.raises(OSError):  # the kernel's buffers take a few megabytes of answers before anything is slow
            connection.sendall(pages)
    _wait(lambda: len(client.server.server_state.connections) <= 1)
    assert client.get("/health").status == 200


def test_a_slow_reader_delays_nobody_and_gets_everything(client, model):
    (expected,) = model.generate("slow", max_tokens=90)
    fields = {"prompt": "slow", "max_tokens": 90, "temperature": 0, "stream": True}
    with _connect(client) as connection:
        connection.sendall(_post("/v1/completions", json.dumps(fields).encode()))
        _wait(lambda: client.metric("mor_running_sequences") == 0 and client.metric("mor_open_requests") == 0)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(50)
    parts = [json.loads(line[6:]) for line in received.decode().split("\n") if line.startswith('data: {"id"')]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected.text


def test_a_full_queue_asks_to_come_back(model):
    with running(model, max_queue=1, max_prompts=20) as client:
        service = client.server.service
        service._open = service._most_open  # as if every place and the queue were taken
        answer = client.complete(prompt="x", max_tokens=5)
        service._open = 0
        assert answer.status == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        error = answer.json["error"]
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
        assert client.complete(prompt=["x"] * service._most_open, max_tokens=5).status == 200


def test_more_prompts_than_ever_fit_are_refused_for_good(model):
    with running(model, max_queue=1, max_prompts=20) as client:
        most = client.server.service._most_open
        answer = client.complete(prompt=["x"] * (most + 1), max_tokens=5)
        assert answer.status == 400 and f"at most {most}" in answer.json["error"]["message"]


def test_too_many_connections_are_refused(model):
    with running(model, max_connections=2) as client, _connect(client), _connect(client):
        _wait(lambda: len(client.server.server_state.connections) >= 2)
        answer = client.complete(prompt="x")
        assert answer.status == 503 and answer.json["error"]["code"] == "too_many_connections"
        assert client.get("/health").status == 200  # who watches the server still sees it


def test_a_request_that_takes_too_long_is_ended(model, monkeypatch):
    _slow_steps(monkeypatch)
    with running(model, request_seconds=0.02) as client:
        answer = client.complete(prompt=["x"] * 16, max_tokens=90)
        assert answer.status == 504 and "request_seconds=0.02" in answer.json["error"]["message"]
        events = client.complete(prompt=["x"] * 16, max_tokens=90, stream=True).events
        assert events[-1]["error"]["type"] == "timeout_error"
        _wait(lambda: _idle(client))


def test_draining_finishes_what_was_accepted(model, monkeypatch):
    _slow_steps(monkeypatch)
    with running(model) as client:
        found = []
        asking = threading.Thread(target=lambda: found.append(client.complete(prompt=["x"] * 16, max_tokens=12)))
        asking.start()
        _wait(lambda: client.metric("mor_running_sequences") > 0)
        client.drain()
        _wait(lambda: client.get("/health").status == 503)
        refused = client.complete(prompt="x")
        assert refused.status == 503 and refused.json["error"]["code"] == "draining"
        assert client.get("/metrics").status == 200
        asking.join(timeout=60)
        client.thread.join(timeout=30)
        assert not client.thread.is_alive()
        assert found[0].status == 200
        assert all(choice["finish_reason"] in ("stop", "length") for choice in found[0].json["choices"])


def test_draining_ends_at_its_limit(model, monkeypatch):
    _slow_steps(monkeypatch)
    with running(model, drain_seconds=0.1) as client, _connect(client) as connection:
        body = json.dumps({"prompt": ["x"] * 16, "max_tokens": 90, "stream": True}).encode()
        connection.sendall(_post("/v1/completions", body))
        _wait(lambda: client.metric("mor_running_sequences") > 0)
        client.drain()
        received = _rest(connection)
        assert b"the server has shut down before the completion was finished" in received
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        client.thread.join(timeout=30)
        assert not client.thread.is_alive() and not client.server.service.failed


def test_a_second_signal_waits_no_longer(model, monkeypatch):
    _slow_steps(monkeypatch)
    with running(model, drain_seconds=60) as client, _connect(client) as connection:
        connection.sendall(_post("/v1/completions", json.dumps({"prompt": ["x"] * 16, "max_tokens": 90}).encode()))
        _wait(lambda: client.metric("mor_running_sequences") > 0)
        client.drain()
        client.drain()
        assert _rest(connection).startswith(b"HTTP/1.1 503")
        client.thread.join(timeout=30)
        assert not client.thread.is_alive()


def test_a_mistake_of_the_server_is_no_end(model, monkeypatch):
    with running(model) as client:
        with monkeypatch.context() as patched:
            patched.setattr(type(model.tokenizer), "encode", lambda tokenizer, text: 1 / 0)
            answer = client.complete(prompt="x")
        assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
        assert client.metric('mor_requests_total{path="/v1/completions",status="500"}') == 1
        assert client.complete(prompt="x").status == 200


def test_a_failing_engine_ends_the_server(model, monkeypatch):
    with running(model) as client:
        monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
        answer = client.complete(prompt="x")
        assert answer.status == 500 and answer.json["error"]["code"] == "engine_failed"
        client.thread.join(timeout=30)
        assert not client.thread.is_alive() and client.server.service.failed


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, steps of engines wait for it, as for a device that hangs."""
    gate, step = threading.Event(), Engine.step
    gate.set()
    monkeypatch.setattr(Engine, "step", lambda engine: (gate.wait(60), step(engine))[1])
    yield gate
    gate.set()


def test_an_engine_that_hangs_is_told_and_may_go_on(model, gate):
    with running(model, stall_seconds=0.3) as client:
        assert client.get("/health").status == 200 and client.metric("mor_seconds_since_step") < 0.3
        gate.clear()
        found = []
        asking = threading.Thread(target=lambda: found.append(client.complete(prompt="x", max_tokens=5, temperature=0)))
        asking.start()
        _wait(lambda: client.get("/health").status == 503)
        error = client.get("/health").json["error"]
        assert error["code"] == "engine_stalled" and "longer than stall_seconds=0.3" in error["message"]
        refused = client.complete(prompt="x")
        assert refused.status == 503 and refused.json["error"]["code"] == "engine_stalled"
        assert client.metric("mor_seconds_since_step") > 0.3
        gate.set()
        _wait(lambda: client.get("/health").status == 200)
        asking.join(timeout=60)
        assert found[0].status == 200
        _wait(lambda: client.metric("mor_seconds_since_step") < 0.3)


def test_an_idle_engine_does_not_hang(model):
    with running(model, stall_seconds=0.1) as client:
        client.complete(prompt="x", max_tokens=3, temperature=0)
        time.sleep(0.3)
        assert client.get("/health").status == 200 and client.metric("mor_seconds_since_step") < 0.1


def test_an_engine_that_hangs_does_not_keep_the_server(model, gate, monkeypatch, caplog):
    monkeypatch.setattr("mor_jax.serve.service._LAST_STEP", 0.3)
    monkeypatch.setattr(logging.getLogger("mor_jax"), "propagate", True)
    with running(model, stall_seconds=0.2, drain_seconds=50) as client, _connect(client) as connection:
        gate.clear()
        connection.sendall(_post("/v1/completions", json.dumps({"prompt": "x", "max_tokens": 9}).encode()))
        _wait(lambda: client.get("/health").status == 503)
        client.drain()
        assert _rest(connection).startswith(b"HTTP/1.1 503")
        client.thread.join(timeout=30)
        assert not client.thread.is_alive() and client.server.service.stuck
        assert "the engine is left behind in a step" in caplog.text


def test_an_engine_without_cuts_refuses_them(model):
    with running(model, dataclasses.replace(ENGINE, cuts=False)) as client:
        assert client.complete(prompt="x", max_tokens=3).status == 200
        for name, value in (("top_k", 3), ("top_p", 0.5), ("min_tokens", 2), ("logprobs", 1)):
            answer = client.complete(prompt="x", **{name: value})
            assert answer.status == 400 and answer.json["error"]["param"] == name
            assert answer.json["error"]["message"] == f"{name}={value} needs an engine with cuts=True"


def test_a_port_in_use_is_told(client):
    with pytest.raises(UserError, match=f"port={client.port}: Address already in use"):
        bind(ServeOptions(port=client.port))
    with pytest.raises(UserError, match=r"host='no\.such\.host\.invalid'"):
        bind(ServeOptions(host="no.such.host.invalid"))
    with pytest.raises(UserError, match=r"host='a\.\.b' port=8000: .*label empty"):
        bind(ServeOptions(host="a..b"))


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0)])
def test_the_loopback_is_known(host, loopback):
    assert ServeOptions(host=host).on_loopback == loopback

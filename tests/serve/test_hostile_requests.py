"""Thousands of malformed and hostile requests: each gets a clean 4xx at once, and the server answers the next one."""

import contextlib
import socket
import time

import pytest
from hostile_examples import DRIPPING, FOLLOWED, RAW, SLOW, bodies
from live_server import TEMPLATE, running, tiny_model

READ_SECONDS = 0.5


@pytest.fixture(scope="module")
def client():
    with running(tiny_model(TEMPLATE), read_seconds=READ_SECONDS) as client:
        yield client


@pytest.fixture
def lives(client):
    """Whatever came, the server answers, has failed at nothing, and holds nothing."""
    yield
    assert client.get("/health").status == 200
    assert client.complete(prompt="a", max_tokens=3, temperature=0).status == 200
    assert client.chat("a", max_tokens=3, temperature=0).status == 200
    assert client.metric("mor_open_requests") == client.metric("mor_running_sequences") == 0
    assert 'status="5' not in client.get("/metrics").body.decode()


def test_each_gets_a_clean_refusal(client, lives):
    headers, begin, refused, slowest = {"Content-Type": "application/json"}, time.monotonic(), 0, 0.0
    for path, body, right in bodies():
        start = time.monotonic()
        answer = client.send("POST", path, body, headers)
        slowest = max(slowest, time.monotonic() - start)
        if right:
            assert answer.status == 200, (path, body[:200], answer)
            continue
        assert 400 <= answer.status < 500, (path, body[:200], answer)
        error = answer.json["error"]
        assert error["message"] and len(error["message"]) < 700 and error["type"], (path, body[:200])
        assert "Traceback" not in error["message"]
        refused += 1
    assert refused > 3000 and slowest < 5 and time.monotonic() - begin < 60


@contextlib.contextmanager
def _connection(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        yield connection


def _statuses(connection, answers=1):
    """Statuses of the answers that come until there are so many or the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while received.count(b"HTTP/1.1 ") < answers and (part := connection.recv(1 << 16)):
            received += part
    return [int(answer[:3]) for answer in received.split(b"HTTP/1.1 ")[1:]]


def test_what_is_hardly_http_is_answered_or_cut_off(client, lives):
    for raw in RAW:
        with _connection(client) as connection:
            with contextlib.suppress(ConnectionError):  # of what is too long, not all is read
                connection.sendall(raw)
            answers = len(FOLLOWED.get(raw, ())) or raw.count(b"HTTP/1.1\r\n") or 1
            statuses = _statuses(connection, answers)
        assert statuses and all(400 <= status < 500 for status in statuses), (raw[:200], statuses)
        assert statuses == FOLLOWED[raw] if raw in FOLLOWED else len(statuses) <= answers, (raw[:200], statuses)


def test_who_sends_slowly_is_cut_off(client, lives):
    with contextlib.ExitStack() as stack:
        begin = time.monotonic()
        waiting = {raw: stack.enter_context(_connection(client)) for raw in SLOW + DRIPPING}
        for raw, connection in waiting.items():
            connection.sendall(raw)
        while time.monotonic() < begin + 2 * READ_SECONDS:
            time.sleep(READ_SECONDS / 10)
            for raw in DRIPPING:
                with contextlib.suppress(ConnectionError):
                    waiting[raw].sendall(b"a")
        for raw, connection in waiting.items():
            statuses = _statuses(connection)
            assert statuses in ([], [400], [408]), (raw[:200], statuses)
        assert time.monotonic() < begin + 4 * READ_SECONDS


def test_what_a_message_holds_is_text_to_the_template(client):
    """Jinja within a message is not run."""
    content = "{{ 7 * 7 }}{% for a in range(9) %}x{% endfor %}"
    answer = client.chat(content, max_tokens=0).json
    assert answer["usage"]["prompt_tokens"] == len(f"[user] {content}\n[assistant] ")

"""Streams completions from an OpenAI-compatible server, and notes when what came.

A thread for every request in flight, with the standard library's client: it takes the time of an event within 0.1 ms
(median, 128 streams on a busy machine), where clients on an event loop queue what arrives at once and are late by 5 ms
(asyncio) or 60 ms (httpx2), which they would add to the server's figures.
"""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mor_jax.errors import reason, require

NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
"""What a connection that does not come about, or breaks, raises; ValueError is that of a name that is no host."""


class RefusedError(Exception):
    """The server answered, but not with a completion."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Reply:
    """What became of one request; times are those of ``time.perf_counter``."""

    due: float
    """When it was to be sent: latencies count from here."""
    sent: float
    asked: int
    """Tokens that the completion was to have."""
    end: float = 0.0
    texts: list[float] = field(default_factory=list)
    """When events with text came."""
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    """Kind; empty is none."""
    detail: str = ""


class HttpClient:
    """One server, a connection per thread that is kept while the server keeps it.

    Args:
        url: of the server, with or without `/v1`.
        key: for `Authorization`, if not empty.
        timeout: seconds of a request.

    Raises:
        UserError: no URL of HTTP.
    """

    def __init__(self, url: str, key: str, timeout: float) -> None:
        parts = urlsplit(url if "://" in url else f"//{url}")
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        require(
            usable and not (parts.query or parts.fragment or parts.username),
            f"URL {url!r} is not like http://HOST:PORT",
        )
        self._root = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._timeout = str(parts.hostname), parts.port, timeout
        self.url = f"{parts.scheme}://{parts.netloc}{self._root}"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._own = threading.local()
        self._open: dict[http.client.HTTPConnection, socket.socket] = {}
        self._closed = False

    def get(self, path: str) -> tuple[int, http.client.HTTPMessage, Any]:
        """GET: status, headers, and the JSON body (None if it is none)."""
        response = self._request("GET", path, None)
        body = response.read()
        with contextlib.suppress(ValueError):
            return response.status, response.headers, json.loads(body)
        return response.status, response.headers, None

    def complete(self, body: bytes, asked: int, due: float | None = None) -> Reply:
        """Ask for a completion and read it to its end; whatever goes wrong is in the reply."""
        sent = time.perf_counter()
        reply = Reply(sent if due is None else due, sent, asked)
        try:
            # parsed when all is there, so that this thread takes no time from those that wait for their events
            _read(reply, list(self._lines(body, sent + self._timeout)))
        except (RefusedError, *NO_ANSWER, LookupError, TypeError, AttributeError) as error:
            self._drop()
            reply.error, reply.detail = kind_of(error), reason(error)
        reply.end = reply.end or time.perf_counter()
        return reply

    def close(self) -> None:
        """Cut all connections: threads that read from one end soon."""
        for connection, connected in list(self._open.items()):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def _lines(self, body: bytes, limit: float) -> Iterator[tuple[float, bytes]]:
        response = self._request("POST", "/v1/completions", body)
        if response.status != 200:
            raise RefusedError(f"http_{response.status}", f"HTTP {response.status}: {_message(response.read())}")
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            response.read()
            raise RefusedError("no_stream", f"the answer is {kind}, not text/event-stream: it does not stream")
        while line := response.readline():
            now = time.perf_counter()
            if line.startswith(b"data:"):
                yield now, line[5:].strip()
                if response.will_close and line.endswith(b"[DONE]\n"):
                    break
            if now > limit:
                raise TimeoutError(f"not finished after {self._timeout:g} s")
        if response.will_close:
            self._drop()

    def _request(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """Send, and wait for the head of the answer; a kept connection may have been closed meanwhile, so try again."""
        connection = getattr(self._own, "connection", None)
        if connection is not None and connection.sock is not None:
            try:
                connection.request(method, self._root + path, body, self._headers)
                return connection.getresponse()
            except (ConnectionResetError, BrokenPipeError):  # also http.client.RemoteDisconnected
                self._drop()
        connection = self._own.connection = self._make(self._host, self._port, timeout=self._timeout)
        connection.connect()
        self._open[connection] = connection.sock
        connection.request(method, self._root + path, body, self._headers)
        return connection.getresponse()

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._open.pop(connection, None)
            self._own.connection = None


def _read(reply: Reply, lines: list[tuple[float, bytes]]) -> None:
    """Take the events of a stream."""
    finished, texts = False, []
    for when, data in lines:
        if data == b"[DONE]":
            finished = True
            break
        event = json.loads(data)
        if "error" in event:
            raise RefusedError("error_event", _message(data))
        for choice in event.get("choices") or ():
            reply.end = when
            finished |= choice.get("finish_reason") is not None
            if choice.get("text"):
                texts.append(choice["text"])
                reply.texts.append(when)
        if usage := event.get("usage"):
            reply.prompt_tokens, reply.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if not finished:
        raise RefusedError("cut", "the stream ended before its completion did")
    reply.text = "".join(texts)


def kind_of(error: BaseException) -> str:
    """Name what went wrong with a request."""
    if isinstance(error, RefusedError):
        return error.kind
    for kind, name in (
        (ssl.SSLError, "tls"),
        (TimeoutError, "timeout"),
        (socket.gaierror, "unknown_host"),
        (ConnectionRefusedError, "connection_refused"),
        (ConnectionError, "connection_lost"),
        (OSError, "connection_failed"),
        (http.client.IncompleteRead, "connection_lost"),
        (http.client.HTTPException, "no_http"),
    ):
        if isinstance(error, kind):
            return name
    return "bad_event"


def _message(body: bytes) -> str:
    """What an error says: OpenAI's form, FastAPI's, or the text as it is."""
    text = body.decode("utf-8", errors="replace")
    try:
        value = json.loads(text)
        value = value.get("error", value)
        if isinstance(value, dict):
            value = value.get("message") or value.get("detail") or text
    except (ValueError, AttributeError):
        value = text
    return value if isinstance(value, str) else json.dumps(value)

"""A small server of OpenAI's form on a free port, which streams words or misbehaves as it is told."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME, GAP = "words", 0.01


class WordServer(ThreadingHTTPServer):
    """Streams `max_tokens` words, each an event, GAP seconds apart."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.asked: list[dict[str, Any]] = []
        """Bodies of the requests."""
        self.connections = 0
        self.running, self.most = 0, 0
        """Completions in flight, now and at most."""
        self.lock, self.stopped = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or events wait for one another, 40 ms at a time
    server: WordServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        if self.path != "/v1/models" or behaviour == "no models":
            return self._send(404, {"detail": "Not Found"})
        names = [NAME, "others"] if behaviour == "two models" else [NAME]
        return self._send(401 if behaviour == "key" else 200, {"data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            self._answer(body, self.server.behaviour, number)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _answer(self, body: dict[str, Any], behaviour: str, number: int) -> None:
        if body["model"] != NAME:
            return self._send(404, {"error": {"message": f"The model {body['model']} does not exist."}})
        if behaviour == "whole":
            return self._send(200, {"choices": [{"text": "all at once", "finish_reason": "length"}]})
        if behaviour == "busy" and number % 4 == 0:
            return self._send(429, {"error": {"message": "the queue is full"}})
        if behaviour == "restless" and number == 2:  # closes what it kept, without an answer
            self.close_connection = True
            return None
        return self._stream(body, behaviour, number)

    def _stream(self, body: dict[str, Any], behaviour: str, number: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b": a comment\n\n")
        length = body["max_tokens"] - (behaviour == "short")
        for index in range(length):
            if behaviour == "cut" and number > 1 and index == 2:
                self.close_connection = True
                return None
            if behaviour == "fails" and number > 1 and index == 2:
                return self._end({"error": {"message": "out of memory"}})
            self.server.stopped.wait(60 if behaviour == "hangs" and number > 1 else GAP)
            last = index == length - 1
            self._event({"choices": [{"index": 0, "text": " word", "finish_reason": "length" if last else None}]})
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": length}
        usage |= {"prompt_tokens_details": {"cached_tokens": 1}} if behaviour == "cache" else {}
        return self._end(None if behaviour == "no usage" else {"choices": [], "usage": usage})

    def _end(self, event: dict[str, Any] | None) -> None:
        if event is not None:
            self._event(event)
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def word_server(behaviour: str = "") -> Iterator[WordServer]:
    """Serve until the end of the block."""
    with WordServer(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()

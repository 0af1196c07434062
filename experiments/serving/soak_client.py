"""Random requests for ``soak.py``: good ones, three in ten chats, bad ones, clients that leave, or hardly read.

Every request ends in an outcome: ``answered``, ``refused`` (with a status that fits and a reason), or ``left``.
Whatever else comes back is a ``Violation``.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

REFUSALS = {"overlong": (400,), "bad_json": (400,), "bad_field": (400,), "too_large": (413,), "unknown_path": (404,)}
CHATS = "/v1/chat/completions"
BUSY = 429
"""Any request may be told that the queue is full."""


class Violation(Exception):
    """The server did what it must not."""


@dataclass(frozen=True)
class Limits:
    """What the client knows of the server."""

    port: int
    max_length: int
    max_request_bytes: int


@dataclass
class Response:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def parse(cls, received: bytes) -> "Response":
        """Take a whole answer apart; raises ``Violation`` if it is none."""
        head, separator, body = received.partition(b"\r\n\r\n")
        if not separator:
            raise Violation(f"no HTTP answer but {received[:200]!r}")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = _unchunk(body)
        elif len(body) != int(headers["content-length"]):
            raise Violation(f"{len(body)} bytes of {headers['content-length']} came")
        return cls(int(first.split()[1]), headers, body)


def _unchunk(body: bytes) -> bytes:
    whole = b""
    while True:
        size, separator, body = body.partition(b"\r\n")
        if not separator:
            raise Violation("a chunked answer was cut")
        count = int(size, 16)
        if count == 0:
            return whole
        whole, body = whole + body[:count], body[count + 2 :]


@dataclass
class Client:
    """Sends requests and judges the answers.

    Args:
        limits: of the server.
        rng: draws requests.
    """

    limits: Limits
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    greedy: dict[str, str] = field(default_factory=dict)
    """Greedy completions by prompt: whatever the load, they stay the same."""
    waits: list[float] = field(default_factory=list)
    """Seconds from sending a request to the first byte of its completion."""
    sent: int = 0

    async def one(self) -> None:
        """Send one random request and keep its outcome; the first requests are one of each kind."""
        kinds: dict[Callable[[], Awaitable[str]], int] = {
            self.whole: 25, self.stream: 25, self.repeated: 10, self.leaves: 12, self.slow_reader: 6,
            self.never_reads: 2, self.overlong: 6, self.bad_json: 5, self.bad_field: 4, self.too_large: 2,
            self.half_sent: 2, self.unknown_path: 1, self.chat: 43,
        }  # fmt: skip
        self.sent += 1
        drawn = self.rng.choices(list(kinds), list(kinds.values()))[0]
        kind = list(kinds)[self.sent - 1] if self.sent <= len(kinds) else drawn
        name = getattr(kind, "__name__", "request")
        try:
            outcome = await asyncio.wait_for(kind(), timeout=120)
        except (Violation, OSError, ValueError, KeyError, TimeoutError) as error:
            outcome = "VIOLATION"
            self.violations.append(f"{name}: {type(error).__name__} {error}")
        self.outcomes[f"{name}: {outcome}"] += 1

    async def whole(self) -> str:
        """A completion in one piece."""
        fields = self._fields()
        response = await self._post(fields)
        if response.status == 200:
            answer = json.loads(response.body)
            _check_choices(answer["choices"], fields)
            counted = sum(len(choice["tokens"]) for choice in answer["choices"])
            _demand(counted == answer["usage"]["completion_tokens"], f"usage {answer['usage']} for {counted} tokens")
        return self._judge(response, ())

    async def stream(self) -> str:
        """A completion as it comes."""
        fields = self._fields() | {"stream": True}
        response = await self._post(fields)
        if response.status == 200:
            _check_choices(_joined(response.body), fields)
        return self._judge(response, ())

    async def repeated(self) -> str:
        """A greedy completion that others ask for too."""
        prompt = self.rng.choice(("The", "return value", "of a", "function is"))
        response = await self._post({"prompt": prompt, "max_tokens": 24, "temperature": 0})
        if response.status == 200:
            text = json.loads(response.body)["choices"][0]["text"]
            expected = self.greedy.setdefault(prompt, text)
            _demand(text == expected, f"greedy {text!r}, before {expected!r}")
        return self._judge(response, ())

    async def chat(self) -> str:
        """A conversation behind one of two common beginnings, whole or as it comes, which some leave."""
        rng, longest = self.rng, self.limits.max_length
        words = rng.choice(("Be kind. ", "Say less. ")) * max(1, 3 * (longest // 64))
        said = "".join(rng.choice("abcde ") for _ in range(rng.randrange(1, 2 + longest // 16)))
        fields = {
            "messages": [{"role": "system", "content": words}, {"role": "user", "content": said}],
            "max_completion_tokens": rng.randrange(1, longest // 4),
            "temperature": rng.choice((0, 1.0)),
            "stream": rng.random() < 0.5,
            "show_depth": True,
        }
        raw = _request(CHATS, json.dumps(fields).encode())
        if rng.random() < 0.1:
            return await self._leave(raw)
        response = await self._exchange(raw, piece=1 << 16, pause=0)
        if response.status == 200:
            choices = _joined(response.body) if fields["stream"] else json.loads(response.body)["choices"]
            _demand(len(choices) == 1, f"{len(choices)} choices in a chat")
            text = choices[0]["text"] if fields["stream"] else choices[0]["message"]["content"]
            told = [{**choices[0], "text": text}]
            _check_choices(told, {"prompt": [said], "echo": False, "max_tokens": fields["max_completion_tokens"]})
        return self._judge(response, ())

    async def leaves(self) -> str:
        """The client closes the connection while its completion runs or waits."""
        fields = self._fields() | {"stream": self.rng.random() < 0.5}
        return await self._leave(_request("/v1/completions", json.dumps(fields).encode()))

    async def half_sent(self) -> str:
        """The client closes the connection in the middle of its request."""
        whole = _request("/v1/completions", json.dumps(self._fields()).encode())
        return await self._leave(whole[: self.rng.randrange(1, len(whole))])

    async def slow_reader(self) -> str:
        """A stream that is read in small pieces with pauses."""
        fields = self._fields() | {"stream": True}
        raw = _request("/v1/completions", json.dumps(fields).encode())
        response = await self._exchange(raw, piece=512, pause=0.02)
        if response.status == 200:
            _check_choices(_joined(response.body), fields)
        return self._judge(response, ())

    async def never_reads(self) -> str:
        """A stream of which nothing is read for a while, and then the client leaves."""
        fields = self._fields() | {"stream": True}
        return await self._leave(_request("/v1/completions", json.dumps(fields).encode()), seconds=2.0)

    async def overlong(self) -> str:
        """More tokens than a sequence may have."""
        if self.rng.random() < 0.5:
            fields = {"prompt": [5] * self.limits.max_length, "max_tokens": 1}
        else:
            fields = {"prompt": "x", "max_tokens": self.limits.max_length + self.rng.randrange(10**6)}
        return self._judge(await self._post(fields), REFUSALS["overlong"])

    async def bad_json(self) -> str:
        """A body that is cut, no UTF-8, or no object."""
        good = json.dumps(self._fields()).encode()
        bodies = (good[: self.rng.randrange(len(good))], b"\xff" * 9, b"[" * 5000, b"3", b'{"prompt": NaN}')
        return self._judge(await self._send("/v1/completions", self.rng.choice(bodies)), REFUSALS["bad_json"])

    async def bad_field(self) -> str:
        """A value that breaks a rule."""
        wrong: dict[str, Any] = self.rng.choice((
            {"temperature": -1}, {"n": 10**6}, {"max_tokens": "many"}, {"stop": [""]}, {"prompt": [10**9]},
            {"logprobs": 50}, {"max_depth": 0}, {"unknown": 1}, {"top_p": 7},
        ))  # fmt: skip
        return self._judge(await self._post(self._fields() | wrong), REFUSALS["bad_field"])

    async def too_large(self) -> str:
        """More bytes than a request may have."""
        body = b"x" * (self.limits.max_request_bytes + self.rng.randrange(1, 10**5))
        return self._judge(await self._send("/v1/completions", body), REFUSALS["too_large"])

    async def unknown_path(self) -> str:
        """A path that is not there."""
        return self._judge(await self._send("/v1/nowhere", b"{}"), REFUSALS["unknown_path"])

    def _fields(self) -> dict[str, Any]:
        rng = self.rng
        longest = self.limits.max_length // 2
        texts = [
            [rng.randrange(200) for _ in range(rng.randrange(1, longest))] for _ in range(rng.choice((1, 1, 1, 3)))
        ]
        return {
            "prompt": texts,
            "max_tokens": rng.randrange(1, self.limits.max_length - longest),
            "temperature": rng.choice((0, 0.7, 1.0)),
            "top_p": rng.choice((1.0, 0.9)),
            "stop": rng.choice((None, ["e"], ["th", "zz"])),
            "show_depth": True,
            "logprobs": rng.choice((None, None, 0, 3)),
            "echo": rng.choice((False, False, True)),
            "logit_bias": rng.choice((None, None, {"101": 5, "32": -100})),
            "min_tokens": rng.choice((0, 0, 1)),
        }

    def _judge(self, response: Response, refusals: tuple[int, ...]) -> str:
        if response.status == 200:
            _demand(not refusals, f"answered, but status {refusals} was due")
            return "answered"
        _demand(response.status in (*refusals, BUSY), f"status {response.status}: {response.body[:200]!r}")
        error = json.loads(response.body)["error"]
        _demand(bool(error["message"]) and bool(error["type"]), f"no reason: {error}")
        _demand(response.status != BUSY or int(response.headers["retry-after"]) > 0, "429 without Retry-After")
        return f"refused {response.status}"

    async def _post(self, fields: dict[str, Any]) -> Response:
        return await self._send("/v1/completions", json.dumps(fields).encode())

    async def _send(self, path: str, body: bytes) -> Response:
        return await self._exchange(_request(path, body), piece=1 << 16, pause=0)

    async def _exchange(self, raw: bytes, piece: int, pause: float) -> Response:
        begin, waited = time.monotonic(), None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.limits.port, limit=piece)
        received = b""
        try:
            writer.write(raw)
            await writer.drain()
            while part := await reader.read(piece):
                received += part
                if waited is None and received.partition(b"\r\n\r\n")[2]:  # a stream's head comes at once
                    waited = time.monotonic() - begin
                await asyncio.sleep(pause)
        finally:
            writer.close()
        response = Response.parse(received)
        if response.status == 200 and waited is not None:
            self.waits.append(waited)
        return response

    async def _leave(self, raw: bytes, seconds: float = 0.3) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", self.limits.port, limit=256)
        writer.write(raw)
        await writer.drain()
        await asyncio.sleep(seconds * self.rng.random())
        writer.transport.abort()
        return "left"


def _request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


def _joined(body: bytes) -> list[dict[str, Any]]:
    """Choices of a stream, put together."""
    parts = body.decode().split("\n\n")
    _demand(parts[-2:] == ["data: [DONE]", ""], f"a stream ends with {parts[-2:]}")
    choices: dict[int, dict[str, Any]] = {}
    for part in parts[:-2]:
        event = json.loads(part.removeprefix("data: "))
        _demand("choices" in event, f"event {event}")
        for new in event["choices"]:
            choice = choices.setdefault(new["index"], {"text": "", "tokens": [], "finish_reason": None})
            _demand(choice["finish_reason"] is None, "tokens after the end")
            choice["text"] += new["text"] if "text" in new else new["delta"].get("content", "")
            choice["tokens"] += new["tokens"]
            choice["finish_reason"] = new["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def _check_choices(choices: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    _demand(len(choices) == len(fields["prompt"]), f"{len(choices)} choices for {len(fields['prompt'])} prompts")
    for choice in choices:
        count = len(choice["tokens"])
        pieces, text = "".join(token["text"] for token in choice["tokens"]), choice["text"]
        _demand(text.endswith(pieces) if fields["echo"] else text == pieces, "pieces are not the text")
        if choice["finish_reason"] == "length":
            _demand(count == fields["max_tokens"], f"{count} tokens of {fields['max_tokens']}")
        else:
            _demand(choice["finish_reason"] == "stop" and 0 < count <= fields["max_tokens"], str(choice)[:200])


async def send_many(client: Client, requests: int, at_once: int) -> None:
    """Send random requests, so many at the same time."""
    left = iter(range(requests))

    async def worker() -> None:
        for _ in left:
            await client.one()

    await asyncio.gather(*(worker() for _ in range(at_once)))

"""A tiny model behind a real server on a free port of the loopback, and a client that speaks plain HTTP."""

import contextlib
import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.language_model import LanguageModel
from mor_jax.model.transformer import init_params
from mor_jax.serve.server import Server, bind
from mor_jax.serve.server_options import ServeOptions

MODEL = ModelConfig(
    vocab_size=257, num_layers=5, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, context_length=96,
    dtype="float32", init_std=0.3, recursion=RecursionConfig(3, "middle_cycle"), routing=RoutingConfig("expert"),
)  # fmt: skip
ENGINE = EngineOptions(max_running=4, max_length=96, steps=4, page_size=8, prefill_rows=2, prefill_chunk=16)
NAME = "tiny"


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == "system" and not loop.first %}
{{ raise_exception("only the first message may be of the system") }}
{% endif %}
[{{ message['role'] }}] {{ message['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}[assistant] {% endif %}
"""


def tiny_model(template: str | None = None) -> LanguageModel:
    """Three recursions, bytes as tokens, and a chat template if there is one."""
    params = jax.jit(lambda: init_params(MODEL, jax.random.key(1)))()
    tokenizer = Tokenizer.bytes_level()
    if template is not None:
        tokenizer.special = dataclasses.replace(tokenizer.special, files={"chat_template.jinja": template})
    return LanguageModel(MODEL, params, tokenizer)


@dataclass
class Answer:
    """What a request got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Server-sent events, of which the last one is [DONE]."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        assert parts.pop() == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts]


@dataclass
class Client:
    """Talks to a server, one connection per request."""

    port: int
    server: Server
    thread: threading.Thread

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """Any request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def get(self, path: str) -> Answer:
        """GET."""
        return self.send("GET", path)

    def complete(self, **fields: Any) -> Answer:
        """POST /v1/completions."""
        return self.send("POST", "/v1/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"})

    def chat(self, *contents: str, **fields: Any) -> Answer:
        """POST /v1/chat/completions; the user speaks first, then in turn."""
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
        body = json.dumps({"messages": messages, **fields}).encode()
        return self.send("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        lines = self.get("/metrics").body.decode().splitlines()
        found = [line for line in lines if line.startswith((name + " ", name + "{"))]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def drain(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(15, None)


@contextlib.contextmanager
def running(model: LanguageModel, engine: EngineOptions = ENGINE, **options: Any) -> Iterator[Client]:
    """Run a server in a thread, and drain it at the end."""
    serve_options = ServeOptions(port=0, **options)
    with bind(serve_options) as listener:
        server = Server(model, NAME, engine, serve_options)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client = Client(listener.getsockname()[1], server, thread)
        try:
            listener.listen()
            client.get("/health")
            yield client
        finally:
            if thread.is_alive():
                client.drain()
            thread.join(timeout=30)
            assert not thread.is_alive()

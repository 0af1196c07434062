"""The ASGI application: paths, and what happens to a request on its way to the engine and back."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.infer import engine
from mor_jax.serve.answer import Answer, ChatAnswer, EventStream
from mor_jax.serve.chat_request import parse_chat_request
from mor_jax.serve.chat_template import ChatTemplate
from mor_jax.serve.completion_request import Prompt, parse_completion_request
from mor_jax.serve.http_errors import CLIENT_LEFT, ApiError, from_user_error
from mor_jax.serve.job import Job
from mor_jax.serve.middleware import CountRequests, KnownHosts
from mor_jax.serve.page import Page
from mor_jax.serve.request_fields import RequestFields
from mor_jax.serve.service import Service
from mor_jax.serve.token_forms import TokenForms

_Read = tuple[RequestFields, list[engine.Request], list[str] | None]
"""A request: what is wanted, its sequences, and the texts to repeat."""
_DISCARDED = 16
"""A body that is too large is read on, up to so many times the limit, since a client that writes does not read."""


class Endpoints:
    """One method per path.

    Args:
        service: leads to the engine.
        tokenizer: of the model.
        name: of the model.
        page: shown at ``/``.
        chat: the model's template, if it has one.
    """

    def __init__(
        self, service: Service, tokenizer: Tokenizer, name: str, page: Page, chat: ChatTemplate | None
    ) -> None:
        self._service, self._tokenizer, self._name, self._page, self._chat = service, tokenizer, name, page, chat
        self._options, self._created, self._forms = service.options, int(time.time()), TokenForms(tokenizer)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._generate(request, self._read_completion, Answer)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        if self._chat is None:
            message = f"the model {self._name!r} has no chat template; /v1/completions continues texts"
            raise ApiError(400, message, code="no_chat_template")
        return await self._generate(request, functools.partial(self._read_chat, self._chat), ChatAnswer)

    async def _generate(self, request: Request, read: Callable[[bytes], _Read], form: type[Answer]) -> Response:
        self._service.check_open()
        self._service.check_room()
        deadline = asyncio.get_running_loop().time() + self._options.request_seconds
        body, arrived = await self._body(request), time.perf_counter()
        # in a thread: a long prompt takes a while to be read and turned into tokens
        wanted, requests, echoed = await asyncio.to_thread(read, body)
        job = self._service.submit(requests, wanted.stop, arrived)
        late = ApiError(504, f"the request took more than request_seconds={self._options.request_seconds:g}")
        timer = asyncio.get_running_loop().call_at(deadline, job.fail, late)
        answer, watch = form(self._name, wanted, job, self._forms, echoed), functools.partial(_client, job)

        def close() -> None:
            timer.cancel()
            self._service.close(job)

        if wanted.stream:
            return EventStream(answer.events(), watch, close)
        try:
            async with watch(request.receive):
                return JSONResponse(await answer.whole())
        finally:
            close()

    async def models(self, request: Request) -> Response:
        """``GET /v1/models`` and ``GET /v1/models/NAME``."""
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "mor_jax",
            "max_length": self._service.shape.max_length,
        }
        wanted = request.path_params.get("name")
        if wanted not in (None, self._name):
            message = f"model={wanted[:100]!r} is not served here; the model is {self._name!r}"
            raise ApiError(404, message, field="model", code="model_not_found")
        return JSONResponse(model if wanted else {"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200, or 503 while the server ends."""
        self._service.check_open()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        await self._service.read_engine()
        return Response(self._service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def page(self, request: Request) -> Response:
        """``GET /``."""
        return HTMLResponse(self._page.html, headers=self._page.headers)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also keeps other sites' forms out
            raise ApiError(415, f"Content-Type={kind[:60]!r} must be 'application/json'")
        most, body, size = self._options.max_request_bytes, bytearray(), 0
        try:
            async with asyncio.timeout(self._options.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        body += part
                    elif size > _DISCARDED * most:
                        break
        except TimeoutError as error:
            message = f"the body did not arrive within read_seconds={self._options.read_seconds:g}"
            raise ApiError(408, message) from error
        except ClientDisconnect as error:
            raise ApiError(CLIENT_LEFT, "the client has left") from error
        if size > most:
            raise ApiError(413, f"the body is larger than max_request_bytes={most}")
        return bytes(body)

    def _read_completion(self, body: bytes) -> _Read:
        wanted = parse_completion_request(body, self._name, self._options.max_prompts)
        prompts = list(map(self._tokens, wanted.prompts))
        echoed = None
        if wanted.echo:
            pairs = zip(wanted.prompts, prompts, strict=True)
            echoed = [text if isinstance(text, str) else self._tokenizer.decode(tokens) for text, tokens in pairs]
        return wanted, self._requests(wanted, prompts, "prompt"), echoed

    def _read_chat(self, chat: ChatTemplate, body: bytes) -> _Read:
        wanted = parse_chat_request(body, self._name, self._options.max_prompts)
        try:
            text = chat.render(wanted.messages, wanted.add_generation_prompt)
            # nothing around it: the template says where BOS stands
            tokens = tuple(self._tokenizer.encode(text, around=False)) or (self._tokenizer.special.start_id,)
        except UserError as error:
            raise from_user_error(error, "messages") from error
        return wanted, self._requests(wanted, [tokens], "messages"), None

    def _requests(self, wanted: RequestFields, prompts: list[tuple[int, ...]], field: str) -> list[engine.Request]:
        stops, most = self._tokenizer.special.stop_ids, self._service.shape.max_length
        requests = wanted.engine_requests(prompts, stops, most)
        try:
            for each in requests:
                self._service.check(each)
        except UserError as error:
            raise from_user_error(error, field) from error
        return requests

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """An empty text begins a new document, as in ``LanguageModel.stream``."""
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt)) or (self._tokenizer.special.start_id,)
        return prompt


@contextlib.asynccontextmanager
async def _client(job: Job, receive: Receive) -> AsyncIterator[None]:
    """Fail the job if its client leaves meanwhile."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.fail(ApiError(CLIENT_LEFT, "the client has left"))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def make_app(
    service: Service, tokenizer: Tokenizer, name: str, page: Page, chat: ChatTemplate | None = None
) -> Starlette:
    """Build the application; starts and stops the service with it, and ends the chat template's process."""
    paths = Endpoints(service, tokenizer, name, page, chat)
    routes = [
        Route("/", paths.page),
        Route("/v1/completions", paths.completions, methods=["POST"]),
        Route("/v1/chat/completions", paths.chat, methods=["POST"]),
        Route("/v1/models", paths.models),
        Route("/v1/models/{name:path}", paths.models),
        Route("/health", paths.health),
        Route("/metrics", paths.metrics),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        if chat is not None:
            chat.close()

    known = [route.path for route in routes]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(CountRequests, counter=service.metrics.requests, paths=known),
            Middleware(KnownHosts, options=service.options),
        ],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail},
    )


async def _refuse(request: Request, error: Any) -> Response:
    return error.response()


async def _refuse_http(request: Request, error: Any) -> Response:
    """Unknown paths and methods."""
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _fail(request: Request, error: Exception) -> Response:
    """A mistake of this program; the traceback goes to the log."""
    return ApiError(500, "internal error; the server's log says more").response()

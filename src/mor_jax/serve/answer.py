"""OpenAI's forms of an answer: one JSON object, or server-sent events with a piece each."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mor_jax.serve.completion_request import CompletionRequest
from mor_jax.serve.http_errors import ApiError
from mor_jax.serve.job import Job, Piece, Update

DONE = b"data: [DONE]\n\n"


class Answer:
    """What is common to all parts of one answer.

    Args:
        model: the model's name.
        wanted: the request.
        job: its sequences.
    """

    def __init__(self, model: str, wanted: CompletionRequest, job: Job) -> None:
        self._wanted, self._job = wanted, job
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        """Wait for everything; raises ``ApiError`` if the request fails."""
        total = {sequence.index: Update() for sequence in self._job.sequences}
        async for updates in self._job.updates():
            for index, update in updates.items():
                total[index].pieces += update.pieces
                total[index].finish = update.finish
        return self._head | {"choices": self._choices(total), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield events until all has been sent; a failure is the last but one."""
        usage = {"usage": None} if self._wanted.include_usage else {}
        try:
            async for updates in self._job.updates():
                choices = self._choices(updates)
                shown = self._wanted.show_depth or any(c["text"] or c["finish_reason"] for c in choices)
                if shown:
                    yield _event(self._head | {"choices": choices} | usage)
            if self._wanted.include_usage:
                yield _event(self._head | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error.body())
        yield DONE

    def _choices(self, updates: Mapping[int, Update]) -> list[dict[str, Any]]:
        return [self._choice(index, update) for index, update in sorted(updates.items())]

    def _choice(self, index: int, update: Update) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": "".join(piece.text for piece in update.pieces),
            "logprobs": None,
            "finish_reason": update.finish or None,
        }
        return choice | {"tokens": list(map(_token, update.pieces))} if self._wanted.show_depth else choice

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(sequence.request.prompt) for sequence in self._job.sequences)
        completion = sum(sequence.count for sequence in self._job.sequences)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class EventStream(StreamingResponse):
    """Sends events as they come.

    Args:
        events: their bytes.
        watch: waits for the client to leave.
        close: called at the end, however it comes.
    """

    def __init__(
        self, events: AsyncIterator[bytes], watch: Callable[[Receive], Any], close: Callable[[], None]
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._watch, self._close = watch, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the status at once, then every event."""
        try:
            async with self._watch(receive):
                await self.stream_response(send)
        finally:
            self._close()


def _event(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _token(piece: Piece) -> dict[str, Any]:
    return {"id": piece.token, "text": piece.text, "depth": piece.depth, "logprob": piece.log_probability}

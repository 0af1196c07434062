"""OpenAI's forms of an answer: one JSON object, or server-sent events with a piece each."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mor_jax.serve.http_errors import ApiError
from mor_jax.serve.job import Job, Update
from mor_jax.serve.request_fields import RequestFields
from mor_jax.serve.token_forms import TokenForms, show_token

DONE = b"data: [DONE]\n\n"


class Answer:
    """What is common to all parts of one answer, in the form of a completion.

    Args:
        model: the model's name.
        wanted: the request.
        job: its sequences.
        forms: of the model's tokens.
        echoed: the texts of the prompts, if completions begin with them.
    """

    prefix, kind = "cmpl", "text_completion"

    def __init__(
        self, model: str, wanted: RequestFields, job: Job, forms: TokenForms, echoed: Sequence[str] | None = None
    ) -> None:
        self._wanted, self._job, self._forms, self._echoed = wanted, job, forms, echoed
        self._length: dict[int, int] = {}
        """Characters of every choice that have been told; none of it before the first."""
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        """Wait for everything; raises ``ApiError`` if the request fails."""
        total = {sequence.index: Update() for sequence in self._job.sequences}
        async for updates in self._job.updates():
            for index, update in updates.items():
                total[index].join(update)
        choices = [self._choice(index, update) for index, update in sorted(total.items())]
        return self._head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield events until all has been sent; a failure is the last but one."""
        usage = {"usage": None} if self._wanted.include_usage else {}
        try:
            async for updates in self._job.updates():
                if choices := self._new_choices(updates):
                    yield _event(self._head | {"choices": choices} | usage)
            if self._wanted.include_usage:
                yield _event(self._head | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error.body())
        yield DONE

    def _new_choices(self, updates: Mapping[int, Update]) -> list[dict[str, Any]]:
        """What an event holds; empty where there is nothing to be seen."""
        choices = [self._choice(index, update) for index, update in sorted(updates.items())]
        tells = self._wanted.show_depth or self._wanted.alternatives is not None
        return choices if tells or any(c["text"] or c["finish_reason"] for c in choices) else []

    def _choice(self, index: int, update: Update) -> dict[str, Any]:
        known = self._length.get(index)
        echoed = self._echoed[index // self._wanted.n] if self._echoed is not None and known is None else ""
        begin = (known or 0) + len(echoed)
        text = "".join(piece.text for piece in update.pieces)
        self._length[index] = begin + len(text)
        logprobs = None
        if self._wanted.alternatives is not None:
            logprobs = self._forms.of_completion(update.pieces, begin)
            if update.prompt is not None:
                before = self._forms.of_prompt(self._job.sequences[index].request.prompt, update.prompt)
                logprobs = {name: before[name] + values for name, values in logprobs.items()}
        choice = {
            "index": index,
            "text": echoed + text,
            "logprobs": logprobs,
            "finish_reason": update.finish or None,
        }
        return choice | self._extension(update)

    def _extension(self, update: Update) -> dict[str, Any]:
        return {"tokens": list(map(show_token, update.pieces))} if self._wanted.show_depth else {}

    def _usage(self) -> dict[str, Any]:
        """Tokens, each prompt's once, and as an extension the mean of the generated tokens' passes."""
        sequences = self._job.sequences
        prompts = sequences[:: self._wanted.n]
        prompt = sum(len(sequence.request.prompt) for sequence in prompts)
        completion = sum(sequence.count for sequence in sequences)
        depth = round(sum(sequence.passes for sequence in sequences) / completion, 4) if completion else None
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.found for sequence in prompts)},
            "mean_depth": depth,
        }


class ChatAnswer(Answer):
    """An answer in the form of a chat."""

    prefix, kind = "chatcmpl", "chat.completion"

    async def events(self) -> AsyncIterator[bytes]:
        """As for completions, but that the first piece of every choice says who speaks."""
        self._head["object"] = "chat.completion.chunk"
        async for event in super().events():
            yield event

    def _choice(self, index: int, update: Update) -> dict[str, Any]:
        text = "".join(piece.text for piece in update.pieces)
        return self._form(index, update, "message", {"role": "assistant", "content": text, "refusal": None})

    def _new_choices(self, updates: Mapping[int, Update]) -> list[dict[str, Any]]:
        choices = []
        for index, update in sorted(updates.items()):
            text = "".join(piece.text for piece in update.pieces)
            delta: dict[str, Any] = {} if index in self._length else {"role": "assistant", "content": ""}
            if text:
                delta["content"] = text
            tells = self._wanted.show_depth or self._wanted.alternatives is not None
            if delta or update.finish or (tells and update.pieces):
                self._length[index] = self._length.get(index, 0) + len(text)
                choices.append(self._form(index, update, "delta", delta))
        return choices

    def _form(self, index: int, update: Update, name: str, value: dict[str, Any]) -> dict[str, Any]:
        told = self._wanted.alternatives
        logprobs = None if told is None else self._forms.of_chat(update.pieces, told)
        choice = {"index": index, name: value, "logprobs": logprobs, "finish_reason": update.finish or None}
        return choice | self._extension(update)


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

"""What the engine has generated for one HTTP request, kept on the event loop until its client takes it.

A slow client delays nobody: the engine never waits, everything that is ready goes out together, and what one request
can pile up is bounded by its max_tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mor_jax.infer.growing_text import GrowingText
from mor_jax.infer.request import PromptScores, Ranked, Request
from mor_jax.serve.http_errors import ApiError

Finish = Literal["stop", "length", "error", ""]


@dataclass(frozen=True)
class Piece:
    """One generated token."""

    text: str
    """New text that can be shown; may be empty, and may end the text of earlier tokens."""
    token: int
    depth: int
    log_probability: float
    time: float
    """``time.perf_counter`` when the host saw it."""
    alternatives: Ranked = ()
    """The most likely tokens at its place, if asked for."""


@dataclass
class Update:
    """What is new in one sequence."""

    pieces: list[Piece] = field(default_factory=list)
    finish: Finish = ""
    """Why it ended; empty while it goes on. `error`: its logits are not finite, which ends the whole request."""
    prompt: PromptScores | None = None
    """With the first token, if asked for."""
    found: int = 0
    """With the first token: tokens of the prompt that need not be read."""

    def join(self, later: "Update") -> None:
        """Take in what came after it."""
        self.pieces.extend(later.pieces)
        self.finish = later.finish
        self.prompt = self.prompt or later.prompt
        self.found += later.found


@dataclass(eq=False)
class PromptSequence:
    """One prompt and its completion."""

    job: "Job"
    index: int
    request: Request
    growth: GrowingText
    """Only the engine's thread touches it, and ``number``."""
    number: int = -1
    """What the engine calls it."""
    begin: float = 0.0
    """``time.perf_counter`` of its first token; 0 before."""
    count: int = 0
    """Tokens generated."""
    passes: int = 0
    """Sum of their depths."""
    found: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    ended: bool = False


class Job:
    """The sequences of one request; used on the event loop alone.

    Args:
        arrived: ``time.perf_counter`` when the whole request was there.
    """

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.sequences: Sequence[PromptSequence] = ()
        self.error: ApiError | None = None
        self._pending: dict[int, Update] = {}
        self._changed = asyncio.Event()

    @property
    def open(self) -> list[PromptSequence]:
        """Sequences that have not ended."""
        return [sequence for sequence in self.sequences if not sequence.ended]

    def add(self, index: int, update: Update) -> None:
        """Keep an update until it is taken, joined with what waits."""
        self._pending.setdefault(index, Update()).join(update)
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """End the request; the first reason counts."""
        self.error = self.error or error
        self._changed.set()

    async def updates(self) -> AsyncIterator[dict[int, Update]]:
        """Yield everything that is new, by sequence, until all have ended.

        Raises:
            ApiError: the request failed; what was there before has been yielded.
        """
        unfinished = len(self.sequences)
        while unfinished:
            await self._changed.wait()
            self._changed.clear()
            taken, self._pending = self._pending, {}
            unfinished -= sum(bool(update.finish) for update in taken.values())
            if taken:
                yield taken
            if unfinished and self.error is not None:
                raise self.error

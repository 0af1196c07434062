"""What the engine has launched and not looked at yet, and what the host learns from it: tokens, and who needs how much.

Letters: B rows of prompts, T tokens of a chunk.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mor_jax.infer.engine_state import COUNTERS, Emitted
from mor_jax.infer.engine_statistics import EngineStatistics
from mor_jax.infer.logprobs import prompt_scores, ranked_tokens
from mor_jax.infer.places import Places, Progress
from mor_jax.infer.request import Token
from mor_jax.infer.sampling import Alternatives


@dataclass(frozen=True)
class Dispatch:
    """Steps of decoding."""

    who: Sequence[Progress | None]
    """Who decodes in every place."""
    result: tuple[jax.Array, jax.Array]
    """Packed tokens, and counters."""

    def land(self, places: Places, statistics: EngineStatistics, cancelled: Collection[int]) -> list[Token]:
        """Wait for the device; return the tokens of requests that are still wanted."""
        packed, counters = jax.device_get(self.result)
        emitted, now = Emitted.unpack(packed), time.perf_counter()
        for name, number in zip(COUNTERS, counters.tolist(), strict=True):
            setattr(statistics, name, getattr(statistics, name) + number)
        for progress in self.who:
            if progress is not None:
                places.landed(progress, None)
        filled = emitted.place >= 0
        fields = (emitted.place, emitted.token, emitted.depth, emitted.log_probability, emitted.finished)
        ranked = Alternatives(*(ranks[filled] for ranks in emitted.alternatives))
        # plain numbers at once: converting them one by one would take longer than the device's work
        return list(self._tokens(places, cancelled, now, ranked, *(field[filled].tolist() for field in fields)))

    def _tokens(
        self, places: Places, cancelled: Collection[int], now: float, ranked: Alternatives, *fields: list[Any]
    ) -> Iterator[Token]:
        """Name the requests of emitted tokens; those cancelled after the dispatch had been launched give none."""
        depths: dict[int, list[int]] = {}
        for nth, (index, token, depth, log_probability, finished) in enumerate(zip(*fields, strict=True)):
            progress = places[index]
            if progress is None or progress is not self.who[index] or progress.number in cancelled:
                continue
            progress.text.append(token)
            depths.setdefault(index, []).append(depth)
            if finished:
                places.book.learn(index, depths.pop(index))
                places.finish(index)
            made = Token(progress.number, token, depth, log_probability, finished, now)
            if count := progress.request.alternatives:
                made = made._replace(alternatives=ranked_tokens(ranked.token[nth], ranked.log_probability[nth], count))
            if not progress.answered:
                scores = prompt_scores(progress) if progress.request.score_prompt else None
                made = made._replace(prompt=scores, found=progress.found)
            progress.answered = True
            yield made
        for index, more in depths.items():
            places.book.learn(index, more)


@dataclass(frozen=True)
class Chunk:
    """Texts being read."""

    reading: Sequence[tuple[int, Progress, int]]
    """Place, request, and tokens of each row."""
    depth_BT: jax.Array

    def land(self, places: Places) -> None:
        """Wait for the device; note how deep the tokens went."""
        depth_BT = jax.device_get(self.depth_BT)
        for row, (index, progress, count) in enumerate(self.reading):
            places.landed(progress, count)
            if places[index] is progress:
                places.book.learn(index, depth_BT[row, :count].tolist())

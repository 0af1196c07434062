"""What the engine has launched and not looked at yet, and what the host learns from it: tokens, and who needs how much.

Letters: S places, N tokens of a dispatch, Q sequences that generated some; B rows of prompts, T tokens of a chunk.
"""

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mor_jax.infer.engine_state import COUNTERS, Emitted
from mor_jax.infer.engine_statistics import EngineStatistics
from mor_jax.infer.logprobs import prompt_scores, ranked_tokens
from mor_jax.infer.places import Places, Progress
from mor_jax.infer.request import Token


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
        for progress in filter(None, self.who):
            places.landed(progress, None)
        who = [
            progress if progress and progress is places[index] and progress.number not in cancelled else None
            for index, progress in enumerate(self.who)
        ]
        wants_S = np.asarray([progress is not None for progress in who])
        return _take_in(places, who, emitted.where((emitted.place >= 0) & wants_S[emitted.place]), now)


def _take_in(places: Places, who: Sequence[Progress | None], emitted: Emitted, now: float) -> list[Token]:
    """Note what sequences generated, take places of finished ones back, and name the requests of tokens.

    A sequence at a time, and plain numbers at once: a few microseconds a token would take longer than the device does.

    Args:
        places: changed.
        who: whose tokens each place's are.
        emitted: [N] of all steps, in order.
        now: when the host saw them.
    """
    numbers = [-1 if progress is None else progress.number for progress in who]
    fields = (emitted.token, emitted.depth, emitted.log_probability, emitted.finished)
    number_N = map(numbers.__getitem__, emitted.place.tolist())
    tokens = list(map(Token, number_N, *(field.tolist() for field in fields), itertools.repeat(now)))
    order_N = np.argsort(emitted.place, kind="stable")
    place_Q, begin_Q = np.unique(emitted.place[order_N], return_index=True)
    bounds, text, depths = [*begin_Q.tolist(), len(tokens)], emitted.token[order_N].tolist(), emitted.depth[order_N]
    depths, order = depths.astype(np.uint8).tobytes(), order_N.tolist()
    ended: list[tuple[int, int]] = []
    for index, (begin, end) in zip(place_Q.tolist(), itertools.pairwise(bounds), strict=True):
        progress = who[index]
        assert progress is not None
        progress.text += text[begin:end]
        places.book.learn(index, depths[begin:end])
        first, last = order[begin], order[end - 1]
        if count := progress.request.alternatives:
            for nth in order[begin:end]:
                ranked = (emitted.alternatives.token[nth], emitted.alternatives.log_probability[nth])
                tokens[nth] = tokens[nth]._replace(alternatives=ranked_tokens(*ranked, count))
        if not progress.answered:
            scores = prompt_scores(progress) if progress.request.score_prompt else None
            tokens[first] = tokens[first]._replace(prompt=scores, found=progress.found)
            progress.answered = True
        if tokens[last].finished:
            ended.append((last, index))
    for _, index in sorted(ended):  # whose prefix is kept longest ended last
        places.finish(index)
    return tokens


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
                places.book.learn(index, depth_BT[row, :count].astype(np.uint8).tobytes())

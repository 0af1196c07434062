"""The engine's host side: a queue of requests, prompts read in chunks between dispatches, and tokens handed out.

The host stays one dispatch behind: it reads the tokens of a dispatch while the next one runs. Requests whose prompt has
been read wait on the device, so that a place that falls free is taken in the same step.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mor_jax.data.special_tokens import MOST_STOP_IDS
from mor_jax.errors import require
from mor_jax.infer.cache import KvUsage, kv_layout, kv_usage
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.infer.engine_state import (
    COUNTERS,
    Control,
    Emitted,
    bias_rows,
    empty_control,
    make_state,
    put_bias,
)
from mor_jax.infer.logprobs import check_extras, prompt_scores, ranked_tokens
from mor_jax.infer.places import Places
from mor_jax.infer.prefill import prefill
from mor_jax.infer.prefill_chunk import with_prefill_chunk
from mor_jax.infer.request import Request, Token
from mor_jax.infer.sampling import Alternatives
from mor_jax.infer.stages import dispatch
from mor_jax.mesh.devices import target_platform
from mor_jax.mesh.mesh import on_mesh


@dataclass
class EngineStatistics:
    """Sums over an engine's life, but for the slots used: those since ``reset_statistics``."""

    tokens: int = 0
    dispatches: int = 0
    prefills: int = 0
    prompt_tokens: int = 0
    block_steps: int = 0
    block_used: int = 0
    block_entries: int = 0
    exit_steps: int = 0
    exit_used: int = 0
    exit_entries: int = 0
    peak: KvUsage = field(default_factory=lambda: KvUsage(0, 0, 0))
    """Largest use of the caches at the times when ``measure`` looked."""


class Engine:
    """Decodes many requests at the same time.

    Args:
        model: from ``prepare_weights``; where it lies, the engine runs.
        options: sizes.
    """

    def __init__(self, model: DecodeModel, options: EngineOptions) -> None:
        options = with_prefill_chunk(options, target_platform(), model.config.context_length)
        self.model, self.options = model, options
        self.shape = engine_shape(model, options)
        self.statistics = EngineStatistics()
        self._layout = kv_layout(model.config)
        self._state = make_state(model, self.shape)
        pages = [pool.free_P.shape[0] for pool in self._state.cache.pools]
        self._places = Places(self.shape.places, pages, self.shape.page_size, self._layout)
        self._next_number = 0
        self._admissions = 0
        self._cancelled: set[int] = set()
        self._flight: deque[tuple[list[int], jax.Array, jax.Array]] = deque()
        self._chunks: deque[jax.Array] = deque(maxlen=2)
        self._settled = True
        """Whether the device has given back the pages of all that it decoded."""

    @property
    def max_running(self) -> int:
        """Sequences decoded at the same time."""
        return self.shape.max_running

    @property
    def places(self) -> int:
        """Sequences that can hold pages at the same time."""
        return self.shape.places

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._places.queue)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(list(self._places.taken))

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self.waiting + self.running > 0

    def submit(self, request: Request) -> int:
        """Queue a request.

        Returns:
            Its number.

        Raises:
            UserError: it can never be served: an empty prompt, tokens outside the vocabulary, or too long.
        """
        self.check(request)
        number = self._next_number
        self._next_number += 1
        self._places.queue.append((number, request))
        return number

    def check(self, request: Request) -> None:
        """Raise ``UserError`` if a request can never be served."""
        length, vocabulary = len(request.prompt) + request.max_tokens, self.model.config.vocab_size
        require(len(request.prompt) > 0, "the prompt holds no token")
        require(request.max_tokens >= 0, f"max_tokens={request.max_tokens} must not be negative")
        stops = len(request.stop_tokens)
        require(stops <= MOST_STOP_IDS, f"stop_tokens holds {stops} tokens, more than {MOST_STOP_IDS}")
        outside = next((t for t in request.prompt if not 0 <= t < vocabulary), None)
        require(outside is None, f"prompt token {outside} is outside 0..{vocabulary - 1}")
        outside = next((t for t in request.stop_tokens if not 0 <= t < vocabulary), None)
        require(outside is None, f"stop_tokens: {outside} is outside 0..{vocabulary - 1}")
        require(
            length <= self.shape.max_length,
            f"prompt ({len(request.prompt)} tokens) and max_tokens={request.max_tokens} exceed "
            f"max_length={self.shape.max_length}",
        )
        require(
            request.max_depth is None or request.max_depth >= 1, f"max_depth={request.max_depth} must be at least 1"
        )
        check_extras(request, self.model.known_tokens or vocabulary, self.shape.cuts)
        needed, pages = self._places.needed(request), self._places.pages
        require(
            all(n <= m for n, m in zip(needed, pages, strict=True)),
            f"the request may need {needed} pages, but the pools hold {pages}",
        )

    def cancel(self, number: int) -> None:
        """Drop a request, wherever it is; it gives no more tokens. An unknown or finished number is ignored."""
        self._places.queue = deque(entry for entry in self._places.queue if entry[0] != number)
        if number in self._places.numbers:
            self._cancelled.add(number)

    def step(self) -> list[Token]:
        """Launch one dispatch and the prompts that fit beside it, and return the tokens of the dispatch before.

        While there is nobody to decode for, prompts are read without dispatches between their chunks.
        """
        control = self._control()
        decodes = any(place.admitted for _, place in self._places.taken)
        if decodes or control.cancel.any() or not self._settled:
            self._dispatch(control)
        else:  # not too far ahead of the device: a request that comes now waits for what has been launched
            jax.block_until_ready(list(self._chunks)[:1])
        self._settled = not decodes
        self._read_prompts()
        return self._collect(keep=1)

    def _dispatch(self, control: Control) -> None:
        with on_mesh(self.model.mesh):
            self._state, emitted, counters = dispatch(self.model, self._state, control, shape=self.shape)
        self._flight.append((self._places.numbers, emitted, counters))
        self.statistics.dispatches += 1

    def drain(self) -> list[Token]:
        """Return the tokens of dispatches that are still on their way."""
        return self._collect(keep=0)

    def run(self) -> Iterator[Token]:
        """Yield tokens until nothing is left to do."""
        while self.busy:
            yield from self.step()
        yield from self.drain()

    def warm_up(self, *, prompts: bool = True) -> None:
        """Compile everything that serving runs; without ``prompts`` only what prompts of one token need."""
        for _ in range(2):  # the second time around, all arrays are what compiled programs returned
            if prompts:
                for scored in (False, True):
                    self._read_prompts(warm_up=True, scored=scored)
            if self.shape.cuts:
                self._put_bias(self.shape.places, ())
            self._settled = False
            self.step()
        self.drain()
        jax.block_until_ready(self._state)
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Begin to count anew."""
        self.statistics = EngineStatistics()

    def measure(self) -> KvUsage:
        """Bytes of keys and values now (waits for the device); remembers the largest."""
        usage, peak = kv_usage(self._state.cache), self.statistics.peak
        largest = zip(dataclasses.astuple(usage), dataclasses.astuple(peak), strict=True)
        self.statistics.peak = KvUsage(*(max(pair) for pair in largest))
        return usage

    def pages_held(self) -> list[tuple[int, int]]:
        """Pages that sequences hold and pages that there are, of the block's pool and the edge's (waits, as above)."""
        free = jax.device_get([pool.num_free for pool in self._state.cache.pools])
        return [(pages - int(left), pages) for pages, left in zip(self._places.pages, free, strict=True)]

    def _control(self) -> Control:
        """Turn what happened since the last dispatch into arrays, and seat queued requests."""
        self._places.seat()
        control = empty_control(self.shape.places)
        for index, place in self._places.taken:
            if place.number in self._cancelled:
                control.cancel[index] = True
                self._places.empty(index)
            elif not place.admitted and not place.unread:
                place.admitted = True
                self._admit(control, index, place.request)
        self._cancelled.clear()
        return control

    def _admit(self, control: Control, index: int, request: Request) -> None:
        rows, sampling = control.requests, request.sampling
        passes = self._layout.passes
        values = (
            (control.admit, True),
            (control.token, request.prompt[-1]),
            (control.position, len(request.prompt) - 1),
            (rows.order, self._admissions),
            (rows.remaining, request.max_tokens),
            (rows.stop_tokens, (request.stop_tokens + (-1,) * MOST_STOP_IDS)[:MOST_STOP_IDS]),
            (rows.max_depth, passes if request.max_depth is None else min(request.max_depth, passes)),
            (rows.stops_at, request.max_tokens - request.min_tokens),
            (rows.has_bias, bool(sampling.logit_bias)),
            (rows.has_alternatives, request.alternatives > 0),
            (rows.sampling.temperature_E, sampling.temperature),
            (rows.sampling.top_k_E, sampling.top_k),
            (rows.sampling.top_p_E, sampling.top_p),
            (rows.sampling.seed_E, sampling.seed),
        )
        for array, value in values:
            array[index] = value
        if sampling.logit_bias:
            self._put_bias(index, sampling.logit_bias)
        self._admissions += 1

    def _put_bias(self, index: int, logit_bias: tuple[tuple[int, float], ...]) -> None:
        with on_mesh(self.model.mesh):
            bias = put_bias(self._state.bias, np.int32(index), *bias_rows(logit_bias))
        self._state = dataclasses.replace(self._state, bias=bias)

    def _read_prompts(self, warm_up: bool = False, scored: bool = False) -> None:
        """Read the next chunk of up to ``prefill_rows`` prompts; if one of them is to be scored, with ``scored``."""
        rows, chunk = self.options.prefill_rows, self.options.prefill_chunk
        assert chunk is not None
        unread = [(index, place) for index, place in self._places.taken if place.unread]
        unread = sorted(unread, key=lambda entry: entry[1].number)[:rows]
        if not unread and not warm_up:
            return
        place_B, targets_BT = np.full(rows, self.shape.places, np.int32), np.full((rows, chunk), -1, np.int32)
        tokens_BT, sizes = np.zeros((rows, chunk), np.int32), np.zeros((3, rows), np.int32)
        for row, (index, place) in enumerate(unread):
            begin, end = place.read, place.read + min(chunk, place.unread)
            part, budget = place.request.prompt[begin:end], place.request.max_depth or self._layout.passes
            place_B[row], tokens_BT[row, : len(part)] = index, part
            sizes[:, row] = begin, len(part), min(budget, self._layout.passes)
            if place.request.score_prompt:
                targets_BT[row, : len(part)] = place.request.prompt[begin + 1 : end + 1]
                scored = True
            place.read = end
            self.statistics.prompt_tokens += len(part)
        with on_mesh(self.model.mesh):
            targets = (targets_BT,) if scored else ()
            cache, output = prefill(self.model, self._state.cache, place_B, tokens_BT, *sizes, *targets)
        for row, (_, place) in enumerate(unread):
            if place.request.score_prompt:
                assert output.scores_BTF is not None
                place.scores.append((output.scores_BTF, row, int(sizes[1, row])))
        self._chunks.append(output.depth_BT)
        self._state = dataclasses.replace(self._state, cache=cache)
        self.statistics.prefills += 1

    def _collect(self, keep: int) -> list[Token]:
        tokens: list[Token] = []
        while len(self._flight) > keep:
            numbers, packed, counters = self._flight.popleft()
            packed, counters = jax.device_get((packed, counters))
            emitted = Emitted.unpack(packed)
            now, total = time.perf_counter(), self.statistics
            for name, number in zip(COUNTERS, counters.tolist(), strict=True):
                setattr(total, name, getattr(total, name) + number)
            filled = emitted.place >= 0
            fields = (emitted.place, emitted.token, emitted.depth, emitted.log_probability, emitted.finished)
            ranked = Alternatives(*(ranks[filled] for ranks in emitted.alternatives))
            # plain numbers at once: converting them one by one would take longer than the device's work
            tokens += self._tokens(numbers, now, ranked, *(field[filled].tolist() for field in fields))
        self.statistics.tokens += len(tokens)
        return tokens

    def _tokens(self, numbers: Sequence[int], now: float, ranked: Alternatives, *fields: list[Any]) -> Iterator[Token]:
        """Name the requests of emitted tokens; those cancelled after the dispatch had been launched give none."""
        for nth, (index, token, depth, log_probability, finished) in enumerate(zip(*fields, strict=True)):
            place = self._places[index]
            if place is None or place.number != numbers[index] or place.number in self._cancelled:
                continue
            if finished:
                self._places.empty(index)
            made = Token(place.number, token, depth, log_probability, finished, now)
            if count := place.request.alternatives:
                made = made._replace(alternatives=ranked_tokens(ranked.token[nth], ranked.log_probability[nth], count))
            if place.request.score_prompt and not place.answered:
                made = made._replace(prompt=prompt_scores(place))
            place.answered = True
            yield made

"""The engine's host side: a queue of requests, prompts read in chunks between dispatches, and tokens handed out.

The host stays one dispatch behind: it reads the tokens of a dispatch while the next one runs. Requests whose prompt has
been read wait on the device, so that a place that falls free is taken in the same step.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mor_jax.errors import require
from mor_jax.infer.cache import KvUsage, kv_layout, kv_usage
from mor_jax.infer.check_request import check_request
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.dispatch_program import dispatch_program
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.infer.engine_state import Control, bias_rows, empty_control, make_state, put_bias
from mor_jax.infer.engine_statistics import EngineStatistics
from mor_jax.infer.exchange import exchange
from mor_jax.infer.flights import Chunk, Dispatch
from mor_jax.infer.host_rows import admit, prompt_rows
from mor_jax.infer.page_book import PageBook
from mor_jax.infer.places import Places, Progress
from mor_jax.infer.prefill import prefill
from mor_jax.infer.prefill_chunk import reads_alone, with_prefill_sizes
from mor_jax.infer.request import Request, Token
from mor_jax.mesh.devices import target_platform
from mor_jax.mesh.mesh import on_mesh


class Engine:
    """Decodes many requests at the same time.

    Args:
        model: from ``prepare_weights``; where it lies, the engine runs.
        options: sizes.
    """

    def __init__(self, model: DecodeModel, options: EngineOptions) -> None:
        platform = target_platform()
        options = with_prefill_sizes(options, platform, model.config.context_length)
        self.model, self.options = model, options
        self._reads_alone = reads_alone(options, model.config.context_length)
        self.shape = engine_shape(model, options)
        self._program = dispatch_program(platform, self.shape.block_slots)
        self.statistics = EngineStatistics()
        self._state = make_state(model, self.shape)
        pages, layout = [pool.free_P.shape[0] for pool in self._state.cache.pools], kv_layout(model.config)
        book = PageBook(self.shape.places, self.shape.kept, pages, self.shape.page_size, layout)
        assert options.prefill_rows is not None
        assert options.prefill_chunk is not None
        self._rows, self._chunk = options.prefill_rows, options.prefill_chunk
        self._places = Places(self.shape.places, book, layout, chunk=self._chunk, steps=options.steps)
        self._next_number = 0
        self._admissions = 0
        self._cancelled: set[int] = set()
        self._flight: deque[Dispatch | Chunk] = deque()

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
        self._places.wait(number, request)
        return number

    def check(self, request: Request) -> None:
        """Raise ``UserError`` if a request can never be served."""
        check_request(
            request,
            vocabulary=self.model.config.vocab_size,
            known_tokens=self.model.known_tokens,
            max_length=self.shape.max_length,
            cuts=self.shape.cuts,
        )
        needed, pages = self._places.needs.at_most(request), self._places.book.pages
        require(
            all(n <= m for n, m in zip(needed, pages, strict=True)),
            f"the request may need {needed} pages, but the pools hold {pages}",
        )

    def cancel(self, number: int) -> None:
        """Drop a request, wherever it is; it gives no more tokens. An unknown or finished number is ignored."""
        self._places.queue = deque(entry for entry in self._places.queue if entry.number != number)
        if number in self._places.numbers:
            self._cancelled.add(number)

    def step(self) -> list[Token]:
        """Launch one dispatch and the prompts that fit beside it, and return the tokens of the dispatch before.

        While there is nobody to decode for, prompts are read without dispatches between their chunks.
        """
        self._forget_cancelled()
        self._places.seat()
        reading = self._places.to_read(self._rows)
        tokens = self._make_room(reading)
        control, decodes = self._control()
        self._exchange()
        if decodes:
            self._dispatch(control)
        reading = [(index, progress) for index, progress in reading if self._places[index] is progress]
        if reading:
            alone = self._reads_alone and len(reading) == 1 and not reading[0][1].request.score_prompt
            self._read_prompts(reading, rows=1 if alone else self._rows)
        tokens += self._collect(dispatches=1, chunks=None if decodes else int(bool(reading)))
        if not self.busy:  # nobody may come for long
            self._exchange()
        return tokens

    def _make_room(self, reading: Sequence[tuple[int, Progress]]) -> list[Token]:
        """See to it that there are pages for what is launched next, if need be by taking the youngest's."""
        tokens: list[Token] = []
        while not self._places.have_room(reading):
            if self._flight:  # what has been launched may have taken less than it could
                tokens += self._collect()
            else:
                self._places.preempt_youngest()
                self.statistics.preemptions += 1
        return tokens

    def _dispatch(self, control: Control) -> None:
        with on_mesh(self.model.mesh):
            self._state, *result = self._program(self.model, self._state, control, shape=self.shape)
        places = (self._places[index] for index in range(self.shape.places))
        who = [place if place is not None and place.admitted else None for place in places]
        for progress in filter(None, who):
            self._places.launched(progress, None)
        self._flight.append(Dispatch(who, tuple(result)))
        self.statistics.dispatches += 1

    def _exchange(self, *, warm_up: bool = False) -> None:
        """Let pages change hands as the book says."""
        orders = self._places.book.take_orders(empty=warm_up)
        if orders is not None:
            with on_mesh(self.model.mesh):
                self._state = exchange(self._state, orders)

    def drain(self) -> list[Token]:
        """Return the tokens of dispatches that are still on their way."""
        return self._collect()

    def run(self) -> Iterator[Token]:
        """Yield tokens until nothing is left to do."""
        while self.busy:
            yield from self.step()
        yield from self.drain()

    def warm_up(self, *, prompts: bool = True) -> None:
        """Compile everything that serving runs; without ``prompts`` only what prompts of one token need."""
        for _ in range(2):  # the second time around, all arrays are what compiled programs returned
            self._exchange(warm_up=True)
            if prompts:
                for scored in (False, True):
                    self._read_prompts([], rows=self._rows, scored=scored)
                if self._reads_alone:
                    self._read_prompts([], rows=1)
            if self.shape.cuts:
                self._put_bias(self.shape.places, ())
            self._dispatch(empty_control(self.shape.places))
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
        """Pages that sequences hold, those kept not counted, and pages that there are, per pool (waits, as above)."""
        free, book = jax.device_get([pool.num_free for pool in self._state.cache.pools]), self._places.book
        kept = (used - seated for used, seated in zip(book.used, book.seated, strict=True))
        return [(pages - int(left) - k, pages) for pages, left, k in zip(book.pages, free, kept, strict=True)]

    def pages_kept(self) -> list[int]:
        """Pages that nobody holds but sequences that have ended, per pool."""
        book = self._places.book
        return [used - seated for used, seated in zip(book.used, book.seated, strict=True)]

    def forget_prefixes(self) -> None:
        """Give back what is kept of sequences that have ended."""
        while self._places.book.evict():
            pass
        self._exchange()

    def _forget_cancelled(self) -> None:
        for index, progress in list(self._places.taken):
            if progress.number in self._cancelled:
                self._places.empty(index)
        self._cancelled.clear()

    def _control(self) -> tuple[Control, bool]:
        """Let requests start whose text has been read; also say whether anybody decodes."""
        control, decodes = empty_control(self.shape.places), False
        for index, progress in self._places.taken:
            if not progress.admitted and not progress.unread:
                progress.admitted = True
                admit(control, index, progress, order=self._admissions, budget=self._places.budget(progress.request))
                if progress.request.sampling.logit_bias:
                    self._put_bias(index, progress.request.sampling.logit_bias)
                self._admissions += 1
                self.statistics.found_tokens += progress.found
                self.statistics.found_prefixes += progress.found > 0
            decodes |= progress.admitted
        return control, decodes

    def _put_bias(self, index: int, logit_bias: tuple[tuple[int, float], ...]) -> None:
        with on_mesh(self.model.mesh):
            bias = put_bias(self._state.bias, np.int32(index), *bias_rows(logit_bias))
        self._state = dataclasses.replace(self._state, bias=bias)

    def _read_prompts(self, reading: Sequence[tuple[int, Progress]], *, rows: int, scored: bool = False) -> None:
        """Read the next chunk of at most ``rows`` texts; with ``scored`` by the program that also scores them."""
        budget = self._places.budget
        whole = [(index, progress, budget(progress.request)) for index, progress in reading]
        texts, targets_BT = prompt_rows(whole, rows, self._chunk, self.shape.places)
        if scored and targets_BT is None:
            targets_BT = np.full(texts.tokens_BT.shape, -1, np.int32)
        with on_mesh(self.model.mesh):
            targets = () if targets_BT is None else (targets_BT,)
            cache, output = prefill(self.model, self._state.cache, *texts, *targets)
        taken = [(index, progress, int(texts.count_B[row])) for row, (index, progress) in enumerate(reading)]
        for row, (_, progress, count) in enumerate(taken):
            if progress.request.score_prompt:
                assert output.scores_BTF is not None
                progress.scores.append((output.scores_BTF, row, count))
            progress.read += count
            self._places.launched(progress, count)
            self.statistics.prompt_tokens += count
        self._flight.append(Chunk(taken, output.depth_BT))
        self._state = dataclasses.replace(self._state, cache=cache)
        self.statistics.prefills += 1

    def _collect(self, dispatches: int = 0, chunks: int | None = 0) -> list[Token]:
        """Look at what has been launched, in order, until so many dispatches and so many chunks are left."""
        tokens: list[Token] = []
        while self._flight:
            left = sum(isinstance(flight, Dispatch) for flight in self._flight)
            if left <= dispatches and (chunks is None or len(self._flight) - left <= chunks):
                break
            flight = self._flight.popleft()
            if isinstance(flight, Dispatch):
                tokens += flight.land(self._places, self.statistics, self._cancelled)
            else:
                flight.land(self._places)
        self.statistics.tokens += len(tokens)
        return tokens

"""Between HTTP and the engine: who is let in, who has left, and how it ends. All of it runs on the event loop."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from mor_jax.infer.growing_text import Decoder, GrowingText
from mor_jax.infer.replicas import AnyEngine
from mor_jax.infer.request import NOT_FINITE, Request
from mor_jax.serve.engine_thread import Batch, EngineThread
from mor_jax.serve.http_errors import ApiError
from mor_jax.serve.job import Job, PromptSequence
from mor_jax.serve.prometheus import EngineReading, Metrics
from mor_jax.serve.server_options import ServeOptions

log = logging.getLogger(__name__)
_LONGEST_RETRY, _READING_SECONDS = 60, 0.25
_LAST_STEP = 10.0
"""Seconds for the engine's thread to end."""


class Service:
    """Takes requests for an engine.

    Args:
        engine: warm, and from now on this object's alone.
        tokenizer: turns tokens into text.
        options: limits.
        metrics: counts.
        on_failure: called on the event loop if the engine fails.
    """

    def __init__(
        self,
        engine: AnyEngine,
        tokenizer: Decoder,
        options: ServeOptions,
        metrics: Metrics,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.options, self.metrics = options, metrics
        self.shape, self.check = engine.shape, engine.check  # neither touches what the thread changes
        self.count_connections: Callable[[], int] = lambda: 0
        """Set by who knows."""
        self.draining = self.failed = self.stuck = self._hurried = self._was_stalled = False
        self._tokenizer, self._on_failure = tokenizer, on_failure
        self._running, self._most_open = engine.max_running, engine.places + options.max_queue
        self._jobs: set[Job] = set()
        self._open = 0
        self._mean_seconds = 1.0
        self._read_at = 0.0
        self._thread = EngineThread(engine, self._deliver_from_thread, self._fail_from_thread)
        metrics.step_time.set_function(self._thread.seconds_at_work)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine's thread; on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the engine's thread; sets ``stuck`` if it does not end."""
        self.stuck = not await asyncio.to_thread(self._thread.stop, _LAST_STEP)
        if self.stuck:
            seconds = self._thread.seconds_at_work()
            log.warning("the engine is left behind in a step that has taken %.0f s: does its device hang?", seconds)

    def check_open(self) -> None:
        """Raise ``ApiError`` (503) unless requests are taken."""
        if self.failed:
            raise ApiError(503, "the engine has failed; the server ends", code="engine_failed")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=1)
        stalled, seconds = self._is_stalled, self._thread.seconds_at_work()
        if stalled != self._was_stalled:
            self._was_stalled = stalled
            log.warning("the engine %s", f"has been at one step for {seconds:.0f} s" if stalled else "goes on")
        if stalled:
            limit = f"stall_seconds={self.options.stall_seconds:g}"
            message = f"the engine has been at one step for {seconds:.0f} s, longer than {limit}"
            raise ApiError(503, message, code="engine_stalled", retry_after=_LONGEST_RETRY)

    @property
    def _is_stalled(self) -> bool:
        return self._thread.seconds_at_work() > self.options.stall_seconds

    def check_room(self) -> None:
        """Raise ``ApiError`` (503) if too many clients are connected."""
        count, most = self.count_connections(), self.options.max_connections
        if count > most:
            message = f"{count} connections are open, more than max_connections={most}"
            raise ApiError(503, message, code="too_many_connections", retry_after=1)

    def submit(self, requests: Sequence[Request], stop: Sequence[str], arrived: float) -> Job:
        """Let a client's sequences in.

        Args:
            requests: one per completion, all of which ``check`` has accepted.
            stop: strings that end a completion.
            arrived: ``time.perf_counter`` when the whole request was there.

        Returns:
            What will hold their tokens; ``close`` it in any case.

        Raises:
            ApiError: 503 while the server ends, 429 if too many sequences wait, 400 if they could never.
        """
        self.check_open()
        if len(requests) > self._most_open:
            message = f"{len(requests)} completions are asked for; at most {self._most_open} can run or wait at once"
            raise ApiError(400, message)
        if self._open + len(requests) > self._most_open:
            message = (
                f"{self._open} sequences run or wait, and the {len(requests)} of this request would exceed "
                f"{self._most_open} (max_queue={self.options.max_queue}); try again later"
            )
            raise ApiError(429, message, code="queue_full", retry_after=self._retry_after())
        job = Job(arrived)
        job.sequences = [
            PromptSequence(job, index, request, GrowingText(self._tokenizer, stop, request.prompt))
            for index, request in enumerate(requests)
        ]
        self._open += len(requests)
        self._jobs.add(job)
        self.metrics.open_requests.set(len(self._jobs))
        self.metrics.accepted.inc(len(requests))
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        for sequence in job.sequences:
            self._thread.submit(sequence)
        return job

    def close(self, job: Job) -> None:
        """Forget a request, answered or not; what still runs of it is cancelled."""
        for sequence in job.open:
            self._end(sequence)
            self._thread.cancel(sequence)
            self.metrics.completions.labels("cancelled").inc()
        if job in self._jobs:
            self._jobs.remove(job)
            self.metrics.open_requests.set(len(self._jobs))
            self.metrics.request_time.observe(time.perf_counter() - job.arrived)

    async def read_engine(self) -> None:
        """Bring the engine's figures up to date, if it answers soon and was not asked just now."""
        now = time.monotonic()
        if self.failed or now - self._read_at < _READING_SECONDS:
            return
        self._read_at = now
        try:
            answer = asyncio.wrap_future(self._thread.ask(EngineReading.take))
            self.metrics.reading = await asyncio.wait_for(answer, timeout=2)
        except TimeoutError:
            log.warning("the engine did not answer within 2 s; /metrics shows its last figures")

    async def drain(self) -> None:
        """Take no more requests, and wait until the accepted ones are answered or their time is over."""
        self.draining = True
        self.metrics.draining.set(1)
        limit = time.monotonic() + self.options.drain_seconds
        log.info("draining: %d requests may finish within %g s", len(self._jobs), self.options.drain_seconds)
        while self._jobs and time.monotonic() < limit and not (self.failed or self._hurried or self._is_stalled):
            await asyncio.sleep(0.05)
        if self._jobs:
            log.warning("%d requests have not finished and are cancelled", len(self._jobs))
        for job in list(self._jobs):
            job.fail(ApiError(503, "the server has shut down before the completion was finished", code="draining"))

    def hurry(self) -> None:
        """Let ``drain`` wait no longer."""
        self._hurried = True

    def _retry_after(self) -> int:
        """Seconds in which about as many sequences end as wait now."""
        rounds = (self._open - self._running) / self._running
        return min(_LONGEST_RETRY, max(1, math.ceil(self._mean_seconds * rounds)))

    def _end(self, sequence: PromptSequence) -> None:
        sequence.ended = True
        self._open -= 1

    def _deliver_from_thread(self, batch: Batch) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, batch)

    def _deliver(self, batch: Batch) -> None:
        for sequence, update in batch.items():
            if sequence.ended:
                continue  # cancelled after the step had begun
            if update.finish == "error":
                self._end(sequence)
                self.metrics.completions.labels("error").inc()
                sequence.job.fail(ApiError(500, NOT_FINITE, code="logits_not_finite"))
                if not update.pieces:
                    continue
                update.finish = ""  # what came before the failure is sent like any other tokens
            if update.pieces:  # there are none where only the prompt was read
                sequence.begin = sequence.begin or update.pieces[0].time
            sequence.count += len(update.pieces)
            sequence.found += update.found
            sequence.passes += sum(piece.depth for piece in update.pieces)
            self.metrics.count(sequence, update)
            if update.finish:
                self._end(sequence)
                if sequence.begin:
                    self._mean_seconds += 0.1 * (time.perf_counter() - sequence.begin - self._mean_seconds)
            sequence.job.add(sequence.index, update)

    def _fail_from_thread(self, error: BaseException) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Any) -> None:
        log.error("the engine has failed", exc_info=error)
        self.failed = True
        for job in list(self._jobs):
            job.fail(ApiError(500, "the engine has failed", code="engine_failed"))
        self._on_failure()

"""The one thread that touches the engine: it takes wishes from a queue, steps, and hands out text.

It turns tokens into text while the device runs the next dispatch, so that neither waits for the other.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from mor_jax.infer.replicas import AnyEngine
from mor_jax.infer.request import Token
from mor_jax.serve.job import Finish, Piece, PromptSequence, Update

Batch = dict[PromptSequence, Update]


class EngineThread:
    """Runs an engine.

    Args:
        engine: warm; nobody else may use it.
        deliver: called in the thread with what every step has generated.
        failed: called in the thread if the engine fails; the thread has then ended.
    """

    def __init__(
        self, engine: AnyEngine, deliver: Callable[[Batch], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._engine, self._deliver, self._failed = engine, deliver, failed
        self._wishes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sequences: dict[int, PromptSequence] = {}
        self._began: float | None = None
        """``time.monotonic`` when it began what it does now; None while it waits for a wish."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End after the step that runs, and wait for that, but not longer.

        Returns:
            Whether it has ended. A thread that waits for a device cannot be made to.
        """
        self._wishes.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def seconds_at_work(self) -> float:
        """Time since the last step or wish was done; 0 while there is nothing to do. Any thread may ask."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, sequence: PromptSequence) -> None:
        """Queue a sequence; the engine must have accepted its request (``Engine.check``)."""
        self._wishes.put(partial(self._submit, sequence))

    def cancel(self, sequence: PromptSequence) -> None:
        """Drop a sequence; its place and pages are free after the step that runs."""
        self._wishes.put(partial(self._cancel, sequence))

    def ask(self, question: Callable[[AnyEngine], Any]) -> Future[Any]:
        """Let the thread answer a question about the engine between two steps."""
        answer: Future[Any] = Future()
        self._wishes.put(partial(self._answer, question, answer))
        return answer

    def _run(self) -> None:
        try:
            while self._take_wishes():
                if self._engine.busy:
                    self._step()
        except BaseException as error:
            self._failed(error)
        finally:
            self._began = None

    def _take_wishes(self) -> bool:
        """Do all that is wished for, waiting for a wish if there is nothing else to do; False is the end."""
        wait = not self._engine.busy
        while True:
            if wait:
                self._began = None
            try:
                wish = self._wishes.get(block=wait)
            except queue.Empty:
                return True
            finally:
                self._began = time.monotonic()
            if wish is None:
                return False
            wish()
            wait = False

    def _submit(self, sequence: PromptSequence) -> None:
        sequence.number = self._engine.submit(sequence.request)
        self._sequences[sequence.number] = sequence

    def _cancel(self, sequence: PromptSequence) -> None:
        if self._sequences.pop(sequence.number, None) is not None:
            self._engine.cancel(sequence.number)

    def _answer(self, question: Callable[[AnyEngine], Any], answer: Future[Any]) -> None:
        if answer.set_running_or_notify_cancel():
            answer.set_result(question(self._engine))

    def _step(self) -> None:
        tokens = self._engine.step()
        if not self._engine.busy:
            tokens += self._engine.drain()
        batch: Batch = {}
        for token in tokens:
            sequence = self._sequences.get(token.request)
            if sequence is None:
                continue  # a stop string ended it before the engine knew
            update = batch.setdefault(sequence, Update())
            update.prompt = update.prompt or token.prompt
            update.found += token.found
            if token.is_valid and sequence.request.max_tokens:
                update.pieces.append(_piece(sequence, token))
            update.finish = _finish(sequence, token)
            if update.finish:
                del self._sequences[token.request]
                if not token.finished:
                    self._engine.cancel(token.request)
        if batch:
            self._deliver(batch)


def _piece(sequence: PromptSequence, token: Token) -> Piece:
    text = sequence.growth.add(token.token, last=token.finished)
    return Piece(text, token.token, token.depth, token.log_probability, token.time, token.alternatives)


def _finish(sequence: PromptSequence, token: Token) -> Finish:
    if not token.is_valid:
        return "error"
    if not sequence.request.max_tokens:
        return "length"
    if token.token in sequence.request.stop_tokens or sequence.growth.stopped:
        return "stop"
    return "length" if token.finished else ""

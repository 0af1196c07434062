"""Turns Ctrl-C and SIGTERM into a request to stop at the next step."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which the first Ctrl-C or SIGTERM only sets ``requested``; a second one acts as it always does.

    Outside the main thread, where Python allows no handlers, signals act as always.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the signal that came; empty before."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            # None: a handler that was not installed from Python, which cannot be put back
            self._previous = {number: signal.SIG_DFL if old is None else old for number, old in previous.items()}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}

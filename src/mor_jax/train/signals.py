"""Turns the signals that end a job into a request to stop at the next step."""

import signal
import threading
from types import FrameType

_ORDERS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers, `kill` and container runtimes send."""
_WARNINGS = (signal.SIGUSR1, signal.SIGHUP)
"""What Slurm sends before the time is over (``--signal=USR1@120``), and a terminal that closes."""


class StopRequest:
    """Context in which SIGINT, SIGTERM, SIGUSR1 or SIGHUP only sets ``requested``.

    A second SIGINT or SIGTERM acts as it always does. A warning never does: a closed terminal sends SIGHUP twice (the
    shell to its jobs, the kernel to the foreground), and Slurm's SIGTERM may come while its SIGUSR1 is being obeyed.
    A warning that the process was started to ignore (``nohup``) stays ignored. Outside the main thread, where Python
    allows no handlers, signals act as always.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal that came; empty before."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            warnings = [number for number in _WARNINGS if signal.getsignal(number) is not signal.SIG_IGN]
            previous = {number: signal.signal(number, self._handle) for number in (*_ORDERS, *warnings)}
            # None: a handler that was not installed from Python, which cannot be put back
            self._previous = {number: signal.SIG_DFL if old is None else old for number, old in previous.items()}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore(tuple(self._previous))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number in _ORDERS:
            self._restore(_ORDERS)

    def _restore(self, numbers: tuple[signal.Signals, ...]) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))  # pyright: ignore[reportArgumentType]

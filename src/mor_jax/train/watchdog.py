"""A thread that says what hangs, and where, when a step or a save takes far too long."""

import faulthandler
import logging
import sys
import threading
import time
from typing import TextIO

_log = logging.getLogger(__name__)


class Watchdog:
    """Dumps the stacks of all Python threads when ``reached`` is not called for a while; the run itself goes on.

    Args:
        seconds: how long anything may take; 0 is off.
        file: where the stacks go; None is stderr.
    """

    def __init__(self, seconds: float, file: TextIO | None = None) -> None:
        self._seconds, self._file = seconds, file
        self._doing, self._since = "", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def reached(self, doing: str) -> None:
        """Restart the clock.

        Args:
            doing: what begins now, for the message.
        """
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        reported: tuple[str, float] | None = None
        while not self._closed.wait(self._seconds / 10):
            current = (self._doing, self._since)
            waited = time.monotonic() - current[1]
            if not current[0] or waited < self._seconds or current == reported:
                continue
            reported = current  # once for every hang
            _log.warning(
                "%s has taken %.0f s, more than train.watchdog_seconds=%g: it hangs, or waits for another host; "
                "the stacks of all threads follow, and the run goes on",
                *(current[0], waited, self._seconds),
            )
            faulthandler.dump_traceback(self._file or sys.stderr, all_threads=True)

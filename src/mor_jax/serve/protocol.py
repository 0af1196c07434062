"""uvicorn's HTTP/1.1 protocol with two more limits: clients that do not send, and clients that do not read."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """Cuts connections on which nothing moves."""

    read_seconds: float
    """Time for a request's head to arrive."""
    write_seconds: float
    """Time for the client to take what is buffered for it."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; it has to send a request."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Something has arrived; if it is no whole head, the rest of it has to arrive too."""
        super().data_received(data)
        if self._between_requests():
            if self._head_timer is None:
                self._await_head()
        else:
            self._head_timer = _stop(self._head_timer)

    def pause_writing(self) -> None:
        """The buffer is full; the client has to read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if not self.transport.is_closing():  # then all of it has to be read
            self._write_timer = _stop(self._write_timer)

    def on_response_complete(self) -> None:
        """All has been written, perhaps into a buffer that nobody empties."""
        super().on_response_complete()
        self._bound_closing()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        self._bound_closing()

    def _bound_closing(self) -> None:
        """A connection that is being closed waits for its buffer to be read: not for ever."""
        if self.transport.is_closing():
            _stop(self._write_timer)
            self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Over."""
        self._head_timer, self._write_timer = _stop(self._head_timer), _stop(self._write_timer)
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.read_seconds, self._no_head)

    def _no_head(self) -> None:
        self._head_timer = None
        if self._between_requests():
            self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def bounded_protocol(read_seconds: float, write_seconds: float) -> type[BoundedProtocol]:
    """Return the protocol with these limits."""
    return type("Protocol", (BoundedProtocol,), {"read_seconds": read_seconds, "write_seconds": write_seconds})

"""Runs the server: socket, warm engine, uvicorn, and an orderly end on SIGTERM."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from mor_jax.errors import UserError
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.language_model import LanguageModel
from mor_jax.serve.app import make_app
from mor_jax.serve.chat_template import open_chat_template
from mor_jax.serve.page import make_page
from mor_jax.serve.prometheus import Metrics
from mor_jax.serve.protocol import bounded_protocol
from mor_jax.serve.server_options import ServeOptions
from mor_jax.serve.service import Service

log = logging.getLogger(__name__)
_LAST_WRITES = 5


def bind(options: ServeOptions) -> socket.socket:
    """Take the port, so that one in use is known before a model is loaded; nobody is let in yet.

    Raises:
        UserError: the address cannot be had.
    """
    with contextlib.ExitStack() as failing:
        try:
            family, kind, number, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = failing.enter_context(socket.socket(family, kind, number))
            if os.name == "posix":  # elsewhere it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, UnicodeError) as error:  # a name that no DNS can hold is a UnicodeError
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"host={options.host!r} port={options.port}: {reason}") from error
        failing.pop_all()
    return listener


class Server(uvicorn.Server):
    """A server that finishes what it has accepted before it ends.

    Args:
        model: what to serve, with its tokenizer.
        name: by which clients call it.
        engine_options: sizes of the engine.
        options: address and limits.
    """

    def __init__(self, model: LanguageModel, name: str, engine_options: EngineOptions, options: ServeOptions) -> None:
        engine = model.new_engine(engine_options)
        engine.warm_up()
        self.service = Service(engine, model.tokenizer, options, Metrics(name), self._stop)
        chat = open_chat_template(model.tokenizer)
        page = make_page(name, kv_layout(model.config).passes, engine_options.cuts, chat is not None)
        self._options, self._draining = options, None
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            make_app(self.service, model.tokenizer, name, page, chat),
            http=bounded_protocol(options.read_seconds, options.write_seconds),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WRITES,
        )
        super().__init__(config)
        self.service.count_connections = lambda: len(self.server_state.connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients in, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        assert sockets, "serve() passes the one that bind() took"
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("serving on http://%s:%d", shown, port)
        if not self._options.on_loopback:
            log.warning("host=%s: whoever reaches it may use it, there is no authentication", self._options.host)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM or Ctrl-C lets requests finish, a second one cancels them."""
        if self._loop is None:  # nobody has been let in
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin the end; on the event loop."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self.service.hurry()

    async def _drain(self) -> None:
        await self.service.drain()
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True


def serve(load: Callable[[], tuple[LanguageModel, str, EngineOptions]], options: ServeOptions) -> int:
    """Serve until a signal comes.

    Args:
        load: returns the model, its name and the engine's sizes; called when the port is known to be free.
        options: address and limits.

    Returns:
        The process's exit code: 0, or 1 if the engine has failed. If it hangs, the process ends here, with 1.

    Raises:
        UserError: the address cannot be had, or what ``load`` raises.
    """
    with bind(options) as listener:
        model, name, engine_options = load()
        server = Server(model, name, engine_options, options)
        gc.collect()
        gc.freeze()  # or the collector looks through all of jax now and then: 0.1 s in which nothing is decoded
        server.run(sockets=[listener])
    if server.service.stuck:  # what else runs at an interpreter's end waits for the device too
        logging.shutdown()
        os._exit(1)
    return 1 if server.service.failed else 0

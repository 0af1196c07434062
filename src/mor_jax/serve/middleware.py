"""Around every request: count it, and refuse host names under which a foreign web page could reach the loopback."""

import re
from collections.abc import Sequence

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor_jax.serve.http_errors import ApiError
from mor_jax.serve.server_options import ServeOptions

_HOST = re.compile(r"(\[[^]]*\]|[^:]*)(:\d+)?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class CountRequests:
    """Counts requests by path and status.

    Args:
        app: the application.
        counter: of the labels ``path`` and ``status``.
        paths: those known; all others count as one.
    """

    def __init__(self, app: ASGIApp, counter: Counter, paths: Sequence[str]) -> None:
        self._app, self._counter, self._paths = app, counter, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, begun = scope["path"] if scope["path"] in self._paths else "other", False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._counter.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not begun:  # who stands around this answers with 500
                self._counter.labels(path, "500").inc()
            raise


class KnownHosts:
    """Refuses unknown names of the host, so that no DNS name of an attacker's leads a browser to the loopback.

    Args:
        app: the application.
        options: where the server listens, and further names.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        own = f"[{options.host}]" if ":" in options.host else options.host
        known = {name.lower() for name in (*_LOOPBACK, own, *options.allowed_hosts)}
        everyone = "*" in known or not (options.on_loopback or options.allowed_hosts)
        self._app, self._known = app, None if everyone else known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass requests to known hosts on."""
        if scope["type"] == "http" and self._known is not None:
            host = Headers(scope=scope).get("host", "")
            found = _HOST.fullmatch(host)
            if found is None or found[1].lower() not in self._known:
                refusal = ApiError(421, f"Host={host[:100]!r} is not known; --allowed-hosts adds names")
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

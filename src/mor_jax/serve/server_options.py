"""Where the server listens, and the limits that keep it answering."""

import ipaddress
from dataclasses import dataclass

from mor_jax.errors import require


@dataclass(frozen=True)
class ServeOptions:
    """Address and limits of a server."""

    host: str = "127.0.0.1"
    """Address to listen on; there is no authentication, so think before it is not the loopback."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names that browsers may use for a server on the loopback, where others are refused; '*' is all."""
    max_queue: int = 64
    """Sequences that may wait for a place; what comes beyond is refused with status 429."""
    max_prompts: int = 16
    """Prompts of one request."""
    max_request_bytes: int = 1 << 20
    """Size of a request's body."""
    max_connections: int = 512
    """Connections at the same time; while there are more, completions are refused with status 503."""
    request_seconds: float = 300.0
    """Time for a request, the queue included; then it is cancelled."""
    read_seconds: float = 10.0
    """Time in which a request must have arrived."""
    write_seconds: float = 30.0
    """Time in which a client must take what waits for it; then the connection is cut and its request cancelled."""
    drain_seconds: float = 30.0
    """Time after SIGTERM in which accepted requests may finish."""
    stall_seconds: float = 120.0
    """Time for one step of the engine; while one takes longer, /health and new completions get status 503."""

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, f"port={self.port} is outside 0..65535")
        for name in ("max_prompts", "max_request_bytes", "max_connections", "request_seconds", "read_seconds"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("write_seconds", "stall_seconds"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("max_queue", "drain_seconds"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

"""The processes of a run meet before JAX starts, so that one that stays away is named instead of waited for in vain.

JAX's own start aborts every process with the words "Deadline Exceeded". Here process 0 listens on the coordinator's
port, which JAX takes over afterwards; the others report to it, and every one of them learns who came.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from mor_jax.errors import UserError, require

_RETRY_SECONDS = 0.2
_LINE_SECONDS = 5.0
_GRACE_SECONDS = 15.0
_LONGEST = 1 << 20


@dataclass(frozen=True)
class ProcessPlace:
    """Where this process stands among the processes of a run."""

    coordinator: str
    """host:port of process 0."""
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    """Devices of this host that belong to this process; None takes all."""

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        require(bool(host) and port.isdecimal(), f"distributed.coordinator={self.coordinator!r} is not host:port")
        require(0 <= self.index < self.count, f"distributed.process_id={self.index} is outside 0..{self.count - 1}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def roll_call(place: ProcessPlace, seconds: float) -> list[str]:
    """Wait until every process has come.

    Args:
        place: of this process.
        seconds: how long to wait.

    Returns:
        The host name of every process, by process id.

    Raises:
        UserError: processes are missing (names them), or do not fit together.
    """
    return _hold(place, seconds) if place.index == 0 else _report(place, seconds)


def _hold(place: ProcessPlace, seconds: float) -> list[str]:
    came: dict[int, tuple[str, socket.socket]] = {}
    error = ""
    deadline = time.monotonic() + seconds
    try:
        with _listen(place) as server:
            while len(came) < place.count - 1 and not error:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    error = _who_is_missing(place, {i: host for i, (host, _) in came.items()}, seconds)
                    break
                error = _admit(place, connection, came)
        hosts = [socket.gethostname(), *(came[i][0] for i in sorted(came))]
        for _, connection in came.values():
            _send(connection, {"error": error, "hosts": hosts})
    finally:
        for _, connection in came.values():
            connection.close()
    if error:
        raise UserError(error)
    return hosts


def _listen(place: ProcessPlace) -> socket.socket:
    _, port = place.address
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=place.count
        )
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port} of {place.coordinator}: {error.strerror}") from error


def _admit(place: ProcessPlace, connection: socket.socket, came: dict[int, tuple[str, socket.socket]]) -> str:
    """Note a process that came; return what is wrong with it, or ""."""
    said = _receive(connection, _LINE_SECONDS)
    try:
        index, count, host = int(said["process"]), int(said["count"]), str(said["host"])
    except (KeyError, TypeError, ValueError):  # a port scanner, a health check
        connection.close()
        return ""
    earlier = came.get(index)
    came[index] = (host, connection)
    if count != place.count:
        return f"process {index} on {host} was told of {count} processes, but process 0 of {place.count}"
    if not 0 < index < place.count:
        return f"process id {index} of {host} is outside 1..{place.count - 1}"
    if earlier is not None:
        error = "" if _hung_up(earlier[1]) else f"two processes came with the id {index}: from {earlier[0]} and {host}"
        if error:
            _send(earlier[1], {"error": error, "hosts": []})
        earlier[1].close()
        return error
    return ""


def _who_is_missing(place: ProcessPlace, came: dict[int, str], seconds: float) -> str:
    known = _known_names(place.count)
    missing = [f"{i} ({known[i]})" if known else str(i) for i in range(1, place.count) if i not in came]
    there = [f"{i} ({host})" for i, host in sorted({0: socket.gethostname(), **came}.items())]
    return (
        f"{place.count - len(missing)} of {place.count} processes came within {seconds:g} s: {', '.join(there)}; "
        f"missing: process {', '.join(missing)} (start the same command there; is the coordinator's port "
        f"{place.address[1]} open?)"
    )


def _known_names(count: int) -> list[str]:
    """Host names by process id where the launcher tells them (GKE, one slice)."""
    names = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    return names if len(names) == count else []


def _report(place: ProcessPlace, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(place.address, timeout=max(deadline - time.monotonic(), 0.1)) as connection:
                said = {"process": place.index, "count": place.count, "host": socket.gethostname()}
                _send(connection, said)
                answer = _receive(connection, seconds + _GRACE_SECONDS)  # process 0 may have started later
        except OSError as error:
            reason = f"; the last attempt: {error.strerror or error}"
            time.sleep(_RETRY_SECONDS)
            continue
        if "hosts" in answer:
            if answer["error"]:
                raise UserError(answer["error"])
            return answer["hosts"]
        reason = "; something there hung up"
        time.sleep(_RETRY_SECONDS)
    raise UserError(
        f"missing: process 0 did not answer process {place.index} ({socket.gethostname()}) at {place.coordinator} "
        f"within {seconds:g} s{reason} (start the same command there; is the address right and the port open?)"
    )


def _send(connection: socket.socket, values: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(values).encode() + b"\n")
    except OSError:  # it died after it came: JAX's own start will say so
        return


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """Read one line of JSON; {} when none comes."""
    connection.settimeout(seconds)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            part = connection.recv(4096)
            if not part:
                return {}
            line += part
        values = json.loads(line)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _hung_up(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True

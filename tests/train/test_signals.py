"""Which signals ask a run to stop, which act when they come again, and a terminal that closes."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import hosts
import pytest

from mor_jax.train.signals import StopRequest

ORDERS = [signal.SIGINT, signal.SIGTERM]
WARNINGS = [signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture
def acted():
    """Handlers that only record, as those from before, for all four signals."""
    seen = []
    record = lambda number, frame: seen.append(signal.Signals(number))  # noqa: E731
    before = {number: signal.signal(number, record) for number in (*ORDERS, *WARNINGS)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [*ORDERS, *WARNINGS])
def test_the_first_signal_only_asks(acted, number):
    with StopRequest() as stop:
        assert stop.requested == ""
        _send(number)
        assert stop.requested == number.name and acted == []
    _send(number)
    assert acted == [number]  # what was there before is there again


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("second", ORDERS)
def test_a_second_order_acts(acted, first, second):
    with StopRequest() as stop:
        _send(first, second)
        assert stop.requested == first.name and acted == [second]


@pytest.mark.parametrize("warning", WARNINGS)
@pytest.mark.parametrize("order", ORDERS)
def test_warnings_may_come_again_and_leave_an_order_one_more(acted, warning, order):
    with StopRequest() as stop:
        _send(warning, *WARNINGS, *WARNINGS, order, warning)
        assert stop.requested == warning.name and acted == []
        _send(order)
        assert acted == [order]


@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_that_was_ignored_from_the_start_stays_ignored(acted, warning):
    signal.signal(warning, signal.SIG_IGN)
    with StopRequest() as stop:
        _send(warning)
        assert stop.requested == "" and signal.getsignal(warning) is signal.SIG_IGN
        _send(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(warning) is signal.SIG_IGN


def test_outside_the_main_thread_signals_are_left_alone(acted):
    requests = []

    def run():
        with StopRequest() as stop:
            requests.append(stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    _send(signal.SIGTERM)
    assert requests[0].requested == "" and acted == [signal.SIGTERM]


@pytest.mark.slow
def test_a_terminal_that_closes_costs_nothing(tmp_path):
    """The kernel sends SIGHUP, and whatever is printed afterwards fails."""
    master, slave = pty.openpty()
    place = {"coordinator": f"localhost:{hosts.free_port()}", "count": 1, "index": 0}
    options = {"folder": str(tmp_path), **place, "pause": 0.2, "train": {"save_every": 0, "steps": 1000}}
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    process = subprocess.Popen(
        [sys.executable, hosts.__file__, json.dumps(options)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MOR_CACHE": str(hosts.CACHE)},
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    shown: list[bytes] = []
    threading.Thread(target=_read, args=(master, shown), daemon=True).start()
    lines, deadline = tmp_path / "tiny" / "metrics.jsonl", time.monotonic() + 120
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, b"".join(shown).decode()
        time.sleep(0.05)
    os.close(master)
    process.wait(timeout=60)
    (step,) = [int(path.name) for path in (tmp_path / "tiny" / "checkpoints").iterdir()]
    assert 2 <= step < 1000


def _read(master, shown):
    try:
        while part := os.read(master, 4096):
            shown.append(part)
    except OSError:  # closed
        pass

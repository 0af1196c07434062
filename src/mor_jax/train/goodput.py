"""A ledger of where the wall-clock time of a run went, throughput, and utilisation against a named peak."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mor_jax.config import Config
from mor_jax.mesh.devices import Device, peak_flops
from mor_jax.model.flops import run_flops

ACTIVITIES = ("init", "compile", "data_wait", "step", "checkpoint", "eval")


class Ledger:
    """Seconds per activity since the ledger was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Charge the time of the block to an activity of ``ACTIVITIES``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] += time.monotonic() - start

    @property
    def elapsed(self) -> float:
        """Seconds since the ledger was made."""
        return time.monotonic() - self._start

    @property
    def goodput(self) -> float:
        """Share of the time that went into training steps."""
        return self.seconds["step"] / max(self.elapsed, 1e-9)

    def summary(self) -> str:
        """Return one line: seconds per activity, the rest, and the goodput."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()]
        other = self.elapsed - sum(self.seconds.values())
        return f"seconds: {', '.join(parts)}, other {other:.1f}; goodput {self.goodput:.0%}"


class Throughput:
    """Tokens per second and utilisation between two readings.

    Args:
        config: of the run.
        ledger: whose step and data time counts.
        devices: devices of the mesh.
    """

    def __init__(self, config: Config, ledger: Ledger, devices: Sequence[Device]) -> None:
        self._ledger = ledger
        self._tokens_per_step = config.train.batch_size * config.model.context_length
        peak = peak_flops(devices[0])
        self._config, self._peak = config, None if peak is None else peak * len(devices)
        self._mark()

    def _mark(self) -> None:
        self._step_seconds, self._wait_seconds = self._ledger.seconds["step"], self._ledger.seconds["data_wait"]

    def read(self, start: int, end: int) -> dict[str, float]:
        """Return the figures of the 0-based steps from ``start`` to before ``end``, those since the last reading.

        `mfu` only on a known device.
        """
        wait = self._ledger.seconds["data_wait"] - self._wait_seconds
        seconds = max(self._ledger.seconds["step"] - self._step_seconds + wait, 1e-9)
        self._mark()
        rate = (end - start) * self._tokens_per_step / seconds
        values = {"tokens_per_second": rate, "data_wait_seconds": wait, "goodput": self._ledger.goodput}
        if self._peak is not None:
            values["mfu"] = run_flops(self._config, start, end) / seconds / self._peak
        return values


def describe_peak(device: Device) -> str:
    """Return the peak that MFU is measured against, or "unknown device"."""
    peak = peak_flops(device)
    return f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown device"

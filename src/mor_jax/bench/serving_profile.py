"""Where the time of a dispatch goes: a trace of one, its kernels grouped by name, and the gaps between them."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from mor_jax.infer.replicas import AnyEngine

Kernel = tuple[str, float, float]
"""Name, begin and duration (seconds)."""


def profile_dispatch(engine: AnyEngine, count: int = 40) -> dict[str, Any]:
    """Trace the engine's next dispatch, which should be a busy one; its tokens are handed out by later steps.

    Kernels of command buffers are told apart by their names alone. The tracing itself lengthens the gaps.

    Args:
        engine: a warm one, with requests.
        count: kernels to list.
    """
    engine.drain()

    def run() -> None:
        engine.step()
        engine.drain()

    return summarize(trace_kernels(run), engine.shape.steps, count)


def trace_kernels(run: Callable[[], None]) -> list[Kernel]:
    """Trace what a function runs; it waits for the device itself."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return device_kernels(ProfileData.from_file(str(newest)))


def device_kernels(trace: Any) -> list[Kernel]:
    """Kernels of a trace's GPUs, in order."""
    lines = [line for plane in trace.planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    streams = [line for line in lines if line.name.startswith("Stream")]
    events = [event for line in streams for event in line.events]
    return sorted(((e.name, e.start_ns * 1e-9, e.duration_ns * 1e-9) for e in events), key=lambda kernel: kernel[1])


def summarize(kernels: Sequence[Kernel], steps: int, count: int) -> dict[str, Any]:
    """Add up kernels by name; microseconds and numbers per step."""
    groups: dict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, 0.0
    for name, begin, duration in kernels:
        groups[re.sub(r"(__?\d+)+$", "", name)].append(duration)
        busy += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    span = end - kernels[0][1] if kernels else 0.0
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))[:count]
    return {
        "steps": steps,
        "kernels_per_step": len(kernels) / steps,
        "span_microseconds_per_step": span / steps * 1e6,
        "busy_microseconds_per_step": busy / steps * 1e6,
        "kernels": [
            {
                "name": name,
                "microseconds_per_step": sum(durations) / steps * 1e6,
                "number_per_step": len(durations) / steps,
                "mean_microseconds": sum(durations) / len(durations) * 1e6,
            }
            for name, durations in ranked
        ],
    }

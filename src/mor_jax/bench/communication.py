"""What of a step's communication no computation hides, from the intervals of a trace's kernels, device by device."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from mor_jax.plan.collectives import KINDS

_COLLECTIVE = re.compile("|".join(sorted(KINDS, key=len, reverse=True)))
_NCCL = {
    "AllGather": "all-gather",
    "AllReduce": "all-reduce",
    "ReduceScatter": "reduce-scatter",
    "SendRecv": "collective-permute",
}
"""Parts of the names of NCCL's kernels, such as `ncclDevKernel_AllReduce_Sum_f32_RING_LL`."""
Intervals = list[tuple[float, float]]


class KernelEvent(NamedTuple):
    """One kernel of a trace; times in seconds."""

    device: str
    """Name of the trace's plane: a GPU, or all of a CPU."""
    operation: str
    """HLO instruction, or NCCL's name."""
    start: float
    seconds: float


def collective_kind(operation: str) -> str | None:
    """Say which of ``plan.collectives.KINDS`` an instruction's name, opcode or kernel says, if any."""
    if operation.startswith("nccl"):
        return next((kind for name, kind in _NCCL.items() if name in operation), None)
    found = _COLLECTIVE.match(operation)
    return None if found is None else found[0]


def communication(events: Sequence[KernelEvent], steps: int) -> list[dict[str, Any]]:
    """Sum up the time that collectives take, per device and step.

    A collective's kernel runs until the last device has come: waiting for others counts as communication.

    Args:
        events: kernels of ``steps`` steps, of any devices; an instruction is a collective by its name.
        steps: traced steps.

    Returns:
        Per device, by name: ``seconds`` in which a collective ran, ``exposed_seconds`` of them in which nothing else
        did, ``idle_seconds`` in which nothing ran between the first kernel and the last, and both of the first by
        ``kinds``.
    """
    by_device: dict[str, list[KernelEvent]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    return [{"device": name, **_of_device(by_device[name], steps)} for name in sorted(by_device)]


def _of_device(events: Sequence[KernelEvent], steps: int) -> dict[str, Any]:
    computing: Intervals = []
    by_kind: dict[str, Intervals] = defaultdict(list)
    for event in events:
        kind = collective_kind(event.operation)
        (computing if kind is None else by_kind[kind]).append((event.start, event.start + event.seconds))
    computed = union(computing)
    exchanged = union([interval for intervals in by_kind.values() for interval in intervals])
    busy = union(computed + exchanged)
    span = busy[-1][1] - busy[0][0]

    def sums(intervals: Intervals) -> dict[str, float]:
        whole = length(intervals)
        hidden = whole + length(computed) - length(union(intervals + computed))
        return {"seconds": whole / steps, "exposed_seconds": (whole - hidden) / steps}

    kinds = {kind: sums(union(intervals)) for kind, intervals in sorted(by_kind.items())}
    return {**sums(exchanged), "idle_seconds": (span - length(busy)) / steps, "kinds": kinds}


def union(intervals: Intervals) -> Intervals:
    """Merge (start, end) pairs that touch; the result is sorted and without overlap."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    """Add up the lengths of intervals without overlap."""
    return sum(end - start for start, end in intervals)

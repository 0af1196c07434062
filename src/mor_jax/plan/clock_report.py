"""What the compiler's clock tells, as JSON values and as tables."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from mor_jax.plan.clock import Clock, Operation
from mor_jax.plan.topology import Generation

_SHOWN = 15


def clock_report(clock: Clock, generation: Generation) -> dict[str, Any]:
    """Collect the clock of one program as JSON values.

    Args:
        clock: from ``read_clock``.
        generation: of the device that it is compiled for.
    """
    hertz = generation.chip.clock_hz
    assert hertz is not None
    return {
        "cycles": clock.cycles,
        "hertz": hertz,
        "seconds": clock.cycles / hertz,
        "cycles_by_kind": clock.by_kind,
        "top": [dataclasses.asdict(operation) for operation in _dearest(clock)],
        "kernels": {name: {**dataclasses.asdict(k), "cycles": k.cycles} for name, k in clock.kernels.items()},
        "left_out": dict(clock.left_out),
    }


def _dearest(clock: Clock) -> list[Operation]:
    """The dearest operations; those of layers that are no loop are added up, under the name of the first."""
    groups: dict[tuple[str, ...], Operation] = {}
    for own in clock.operations:
        key = (own.kind, own.opcode, own.shape, own.source)
        first = groups.get(key)
        if first is not None:
            own = dataclasses.replace(first, cycles=first.cycles + own.cycles, times=first.times + own.times)
        groups[key] = own
    return sorted(groups.values(), key=lambda operation: -operation.cycles)[:_SHOWN]


def with_attainable(report: dict[str, Any], parts: Mapping[str, float], flops: float, peak: float) -> dict[str, Any]:
    """Add what is attainable to the clock of a train step.

    Args:
        report: from ``clock_report``.
        parts: from ``attainable_seconds``.
        flops: of the model, per device.
        peak: of a device, FLOP/s.
    """
    attainable = {"attainable_seconds": math.fsum(parts.values()), "attainable_by_part": dict(parts)}
    return {**report, **attainable, "mfu": flops / report["seconds"] / peak}


def clock_tables(report: dict[str, Any], title: str = "by the compiler's clock, nothing measured") -> Group:
    """Lay out a clock: cycles by kind, the dearest operations, what is left out.

    Args:
        report: from ``clock_report``, perhaps ``with_attainable``.
        title: of the first table.
    """
    kinds = Table(f"\n{title}", box=None, pad_edge=False)
    for column in ("\nMcycles", "\nms", "\n"):
        kinds.add_column(column, justify="right")
    for kind, cycles in {**report["cycles_by_kind"], "together": report["cycles"]}.items():
        cells = (f"{cycles / 1e6:,.2f}", f"{1e3 * cycles / report['hertz']:,.2f}")
        kinds.add_row(kind, *cells, f"{cycles / max(1, report['cycles']):.1%}")
    if "attainable_seconds" in report:
        best = report["attainable_seconds"]
        cells = (f"{best * report['hertz'] / 1e6:,.2f}", f"{1e3 * best:,.2f}", f"{best / report['seconds']:.1%}")
        kinds.add_row("attainable", *cells)
        kinds.add_row("MFU", "", "", f"{report['mfu']:.1%}")
    if "bytes_seconds" in report:
        best = report["bytes_seconds"]
        cells = (f"{best * report['hertz'] / 1e6:,.2f}", f"{1e3 * best:,.2f}", f"{best / report['seconds']:.1%}")
        kinds.add_row("weights, keys and values read once", *cells)
        kinds.add_row("tokens/s", "", f"{report['tokens_per_second']:,.0f}", f"of {report['steps']} steps")
    top = Table("\nMcycles", "\nruns", "dearest operations\nkind", "\nresult", "\nfrom", box=None, pad_edge=False)
    for operation in report["top"]:
        cells = (f"{operation['cycles'] / 1e6:,.2f}", str(operation["times"]), operation["kind"])
        top.add_row(*cells, operation["shape"][:40], operation["source"].split("/while/body/")[-1][-60:])
    left = Table("\nleft out, beside the host", "\nruns", box=None, pad_edge=False)
    for name, times in report["left_out"].items():
        left.add_row(name, f"{times:,}")
    guesses = sum(kernel["guesses"] for kernel in report["kernels"].values())
    if guesses:
        left.add_row("branches of kernels that run-time data decides, counted as taken", f"{guesses:,}")
    return Group(kinds, top, left)

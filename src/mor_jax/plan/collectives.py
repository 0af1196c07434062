"""Count what devices exchange in a compiled program: collectives by kind, bytes and reach, loops multiplied out.

Sizes are one device's, as HLO after partitioning states them. ``bytes`` is what the fastest ring makes one device
receive; a network of another shape changes the time, not the order of things.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mor_jax.plan.hlo import ArrayShape, Computation, Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str
    """Of ``KINDS``; the `-start` of an asynchronous pair counts, its `-done` does not."""
    operands: tuple[ArrayShape, ...]
    """What each device puts in."""
    group_size: int
    """Devices that exchange with each other; 1 exchanges nothing."""
    executions: int
    """Runs per run of the program."""
    across: bool
    """Whether a group spans several slices (always false when the slices are not told)."""
    op_name: str
    """Where in the traced program it comes from; may be empty."""

    @property
    def bytes(self) -> int:
        """Bytes that one device receives in one execution: for n devices in a ring, (n - 1) / n of the whole buffer.

        The whole buffer is the result of an all-gather and the operand of the others; an all-reduce passes it twice.
        A permute receives its operand.
        """
        operand, n = sum(shape.bytes for shape in self.operands), self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return operand if n > 1 else 0
        whole = operand * n if self.kind == "all-gather" else operand
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * whole * (n - 1) // n

    @property
    def total_bytes(self) -> int:
        """Bytes that one device receives in one run of the program."""
        return self.bytes * self.executions


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """List the collectives that a program runs, without those whose groups are single devices.

    Args:
        module: from ``hlo.parse``.
        devices: devices that the program was compiled for.
        slices: slices of equal size, the outermost mesh axis.

    Raises:
        ValueError: replica groups in a notation that is not known.
    """
    found = []
    for computation, instruction, executions in module.executed():
        if instruction.opcode == "send" and (sent := _MEGASCALE.search(instruction.attributes)):
            kind, operands = sent[1].lower().replace("_", "-"), _operands(computation, instruction)[:1]
            found.append(Collective(kind, operands, slices, executions, True, instruction.op_name))
            continue
        kind = instruction.opcode.removesuffix("-start")
        if computation.name.startswith("all-reduce-scatter"):  # TPU writes reduce-scatter as a fusion of this name
            kind = kind.replace("all-reduce", "reduce-scatter")
        if kind not in KINDS or _is_continued(computation, instruction):
            continue
        groups = _groups(instruction, devices)
        size = max(len(set(group)) for group in groups)
        if size > 1:
            across = any(len({device * slices // devices for device in group}) > 1 for group in groups)
            operands = _operands(computation, instruction)
            found.append(Collective(kind, operands, size, executions, across, instruction.op_name))
    return found


def _is_continued(computation: Computation, instruction: Instruction) -> bool:
    """Whether this is a copy of a collective that runs already.

    TPU overlaps a collective with arithmetic by a chain of fusions, each with a copy of it: one that starts it, some
    that compute beside it, one that ends it. Only the first, whose copy goes into `AsyncCollectiveStart`, counts.
    """
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    users = (i for i in computation.instructions.values() if instruction.name in i.operands)
    return not any(user.attribute("custom_call_target") == "AsyncCollectiveStart" for user in users)


def _operands(computation: Computation, instruction: Instruction) -> tuple[ArrayShape, ...]:
    names = instruction.operands
    if instruction.opcode.startswith(("collective-permute", "ragged-all-to-all")):
        names = names[:1]  # the others are buffers to write into, and offsets
    return tuple(shape for name in names for shape in computation.instructions[name].shapes)


_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""Between TPU slices a device hands its part of a collective to the host's runtime: send, and recv of the result."""
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _ORDER)
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _ORDER + r"\))? \{([^{}]*)\}")
_SIZE = re.compile(r"'([^']+)'=(\d+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _ordered(source: str, order: str | None) -> np.ndarray:
    """Device numbers 0..n-1 in the shape ``source``, transposed."""
    sizes = _numbers(source)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_numbers(order)) if order else devices


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Devices of each group (of each pair, for a permute)."""
    text = instruction.attributes
    if pairs := _PAIRS.search(text):
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if iota := _IOTA.search(text):
        return _ordered(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    if mesh := _MESH.search(text):
        return _mesh_groups(*mesh.groups())
    if listed := _LISTED.search(text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(devices))]
    raise ValueError(f"replica groups of {instruction.name} cannot be read: {text[:120]}")


def _mesh_groups(mesh: str, source: str | None, order: str | None, axes: str) -> list[list[int]]:
    """Groups along mesh axes: ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}``; ``'b':(2)2`` is a part of b."""
    sizes = {name: int(size) for name, size in _SIZE.findall(mesh)}
    parts: list[tuple[str, int, bool]] = []  # of every mesh axis: name, size, whether a group runs along it
    named = {(name, int(before or 1)): int(size or sizes[name]) for name, before, size in _AXIS.findall(axes)}
    for name, size in sizes.items():
        done = 1
        for before, part in sorted((b, p) for (n, b), p in named.items() if n == name):
            parts += [(name, before // done, False), (name, part, True)]
            done = before * part
        parts.append((name, size // done, False))
    devices = _ordered(source or str(math.prod(sizes.values())), order).reshape([size for _, size, _ in parts])
    along = [i for i, (_, _, grouped) in enumerate(parts) if grouped]
    others = [i for i in range(len(parts)) if i not in along]
    group = math.prod(parts[i][1] for i in along)
    return devices.transpose(others + along).reshape(-1, group).tolist()


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Sum up per kind: ``{"all-gather": {"count": ..., "bytes": ..., "bytes_across": ...}, ...}`` per program run.

    ``count`` is of executions, ``bytes`` what one device receives on its slice, ``bytes_across`` what it receives in
    groups that span slices.
    """
    totals: dict[str, dict[str, int]] = {}
    for item in found:
        total = totals.setdefault(item.kind, {"count": 0, "bytes": 0, "bytes_across": 0})
        total["count"] += item.executions
        total["bytes_across" if item.across else "bytes"] += item.total_bytes
    return dict(sorted(totals.items()))

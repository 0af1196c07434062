"""How long a compiled TPU program takes by its compiler's own clock: cycles of every operation, loops multiplied out.

Every fusion and copy of a TPU program carries the compiler's estimate of its cycles. Kernels (custom calls) carry none:
theirs are read off their VLIW programs (``clock_kernels``). Gathers, scatters and reshapes carry none either: they take
what they write, once, over the memory's speed. Transfers to and from VMEM run beside the operations, one after the
other at the memory's speed; what an operation then waits for them counts. Nothing here was measured.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mor_jax.plan.clock_kernels import KernelCost, base_name, bytes_per_cycle, kernel_costs
from mor_jax.plan.hlo import Computation, Instruction, Module
from mor_jax.plan.topology import Generation

MATMULS, KERNELS, ATTENTION, NORMS = "block matmuls", "attention kernels", "attention other", "norms"
PAGES, HEAD, SAMPLING, ROUTING = "cache pages", "head and loss", "sampling", "routing"
OPTIMISER, COPIES, WAITS, OTHER = "optimiser", "copies and layout", "waiting for transfers", "other"
KINDS = (MATMULS, KERNELS, ATTENTION, NORMS, PAGES, HEAD, SAMPLING, ROUTING, OPTIMISER, COPIES, WAITS, OTHER)
"""What the cycles of a step go into."""
COMMUNICATION = "communication"
"""What has no cycles here."""
_SCOPES = (  # the first that matches the place in the traced program
    (OPTIMISER, r"optimiser"),
    (PAGES, r"cache_pages"),
    (SAMPLING, r"sampling"),
    (HEAD, r"head_loss|/head\b|logits"),
    (ROUTING, r"routing|router|top_k|select_rows|gather_rows|scatter_rows"),
    (NORMS, r"norm"),
    (ATTENTION, r"attention|rotary"),
    (MATMULS, r"ffn|dense|mlp"),
)
_LAYOUT = ("copy", "transpose", "reshape", "broadcast", "bitcast-convert", "slice", "concatenate", "pad")
_PRODUCTS = ("dot", "convolution")
_WRITES_PART = {"scatter": 2, "dynamic-update-slice": 1}
"""The operand that is written into the first one."""
_MOVERS = (*_LAYOUT, *_WRITES_PART, "gather", "dynamic-slice")
"""What only moves data."""
_TRANSFERS = ("copy-start", "slice-start")
"""Begin what the opcode that ends with `-done` waits for."""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send", "recv")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
_SCALAR = 1024
"""Elements up to which an operation without an estimate is not worth a line."""


@dataclass(frozen=True)
class Operation:
    """An instruction of the program with what it costs in one run."""

    cycles: int
    """Of all its executions."""
    times: int
    """How often it runs."""
    name: str
    opcode: str
    kind: str
    """One of ``KINDS``."""
    shape: str
    """Of its result."""
    source: str
    """Place in the traced program; empty if the compiler made it up."""


@dataclass(frozen=True)
class Clock:
    """Cycles of one run of a program on one device."""

    operations: tuple[Operation, ...]
    """Dearest first."""
    left_out: Counter[str]
    """What has no cycles here, by opcode or kernel, with how often it runs."""
    kernels: Mapping[str, KernelCost]
    """One execution of each kernel, by instruction."""

    @property
    def cycles(self) -> int:
        """All of them, one after the other."""
        return sum(operation.cycles for operation in self.operations)

    @property
    def by_kind(self) -> dict[str, int]:
        """Cycles of each kind, in the order of ``KINDS``."""
        sums = Counter()
        for operation in self.operations:
            sums[operation.kind] += operation.cycles
        return {kind: sums[kind] for kind in KINDS if sums[kind]}


def clock_of(module: Module, dump: Path, generation: Generation, rows: int) -> Clock:
    """Read the cycles of a program with those of its kernels, and empty the dump for the next one.

    Args:
        module: compiled for a TPU.
        dump: folder of ``clock_kernels.dump_into``, in which only this program was dumped.
        generation: of the device.
        rows: of one device and micro-batch.
    """
    clock = read_clock(module, kernel_costs(module, dump, generation, rows), generation)
    for path in dump.glob("*.txt"):
        path.unlink()
    return clock


def read_clock(module: Module, kernels: Mapping[str, KernelCost], generation: Generation) -> Clock:
    """Sum the cycles of a compiled program.

    Args:
        module: compiled for a TPU.
        kernels: from ``kernel_costs``; those without are left out.
        generation: of the device.
    """
    found, left_out = [], Counter()
    device, places = _Device(module, kernels, generation), _places(module)
    for computation, instruction, times in module.executed():
        if computation.name in device.fused:
            continue
        cycles = device.cycles(computation, instruction)
        if cycles is None:
            if reason := _left_out(instruction):
                left_out[reason] += times
        elif cycles:
            kind, source = _classify(module, instruction, places.get(computation.name, ""))
            row = (cycles * times, times, instruction.name, instruction.opcode, kind, _shape(instruction), source)
            found.append(Operation(*row))
        if wait := device.waits(computation).get(instruction.name):
            user = next((i for i in computation.instructions.values() if instruction.name in i.operands), instruction)
            row = (instruction.name, instruction.opcode, WAITS, _shape(instruction), user.op_name)
            found.append(Operation(wait * times, times, *row))
    return Clock(tuple(sorted(found, key=lambda operation: -operation.cycles)), left_out, kernels)


def kinds_of(module: Module) -> dict[str, str]:
    """Kind of every instruction that takes time, by name: those of ``read_clock``, and ``COMMUNICATION``."""
    found, fused, places = {}, _fused(module), _places(module)
    for computation, instruction, _ in module.executed():
        if computation.name in fused or instruction.opcode in _FREE:
            continue
        if instruction.opcode.startswith(_COLLECTIVES) or instruction.name.startswith(_COLLECTIVES):
            kind = COMMUNICATION
        elif instruction.opcode in _TRANSFERS or instruction.opcode.endswith("-done"):
            kind = WAITS
        else:
            kind = _classify(module, instruction, places.get(computation.name, ""))[0]
        found[instruction.name] = kind
    return found


class _Device:
    """What the operations of a program take on one device: its clock, and its memory's speed."""

    def __init__(self, module: Module, kernels: Mapping[str, KernelCost], generation: Generation) -> None:
        self._module, self._kernels = module, kernels
        self._bytes_per_cycle = bytes_per_cycle(generation)
        self.fused = _fused(module)
        self._walked: dict[str, tuple[int, dict[str, int]]] = {}

    def cycles(self, computation: Computation, instruction: Instruction) -> int | None:
        """Cycles of an operation by itself, None if it is not known or a transfer."""
        if kernel := self._kernels.get(instruction.name):
            return kernel.cycles
        if (estimate := _estimate(instruction)) is not None:
            return estimate
        moved = _moved(self._module, computation, instruction)
        return None if moved is None else self._over_memory(moved)

    def waits(self, computation: Computation) -> dict[str, int]:
        """Cycles that the ends of transfers wait for them in one execution, by name."""
        return self._walk(computation)[1]

    def _over_memory(self, moved: int) -> int:
        return round(moved / self._bytes_per_cycle)

    def _walk(self, computation: Computation) -> tuple[int, dict[str, int]]:
        """Go through a computation in its order; transfers wait for one another, and operations for their end."""
        if computation.name in self._walked:
            return self._walked[computation.name]
        now, memory_free, ends, waits = 0, 0, {}, {}
        for instruction in computation.instructions.values():
            if instruction.opcode in _TRANSFERS:
                moved = min(shape.bytes for shape in instruction.shapes[:2])  # the whole and the part, or two wholes
                memory_free = max(now, memory_free) + self._over_memory(moved)
                ends[instruction.name] = memory_free
            elif instruction.opcode.endswith("-done") and instruction.operands[0] in ends:
                waits[instruction.name] = max(0, ends[instruction.operands[0]] - now)
                now += waits[instruction.name]
            else:
                now += self.cycles(computation, instruction) or self._inside(instruction)
        self._walked[computation.name] = now, waits
        return now, waits

    def _inside(self, instruction: Instruction) -> int:
        """Cycles of the loops and branches that an instruction runs."""
        called = self._module.called(instruction)
        return sum(times * self._walk(self._module.computations[name])[0] for name, times in called)


def _fused(module: Module) -> set[str | None]:
    """Computations that run inside one instruction, whose estimate has them."""
    return {_called(i) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "fusion"}


def _places(module: Module) -> dict[str, str]:
    """Where loops come from, by their body: the compiler makes up loops whose instructions do not tell."""
    instructions = (i for computation in module.computations.values() for i in computation.instructions.values())
    loops = (i for i in instructions if i.opcode == "while")
    return {(loop.attribute("body") or "").lstrip("%"): loop.op_name for loop in loops}


def _called(instruction: Instruction) -> str | None:
    found = re.search(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else None


def _estimate(instruction: Instruction) -> int | None:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else None


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """Bytes that an operation without an estimate writes; None if it is next to nothing, or does more than move."""
    if sum(shape.elements for shape in instruction.shapes) <= _SCALAR:
        return None
    parts = [(computation, instruction), *_inner(module, instruction)]
    for own, part in parts:
        if part.opcode in _WRITES_PART:  # the rest stays where it is
            return own.operand(part, _WRITES_PART[part.opcode]).bytes
    moves = any(part.opcode in _MOVERS for _, part in parts) and instruction.opcode in ("fusion", *_MOVERS)
    return sum(shape.bytes for shape in instruction.shapes) if moves else None


def _left_out(instruction: Instruction) -> str | None:
    """Name what an instruction without an estimate is; None if it is free or next to it."""
    opcode = instruction.opcode
    if opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
        return f"kernel {base_name(instruction.name)}" if target == "tpu_custom_call" else None
    if opcode in (*_FREE, *_TRANSFERS) or opcode.endswith("-done"):
        return None
    if opcode.startswith(_COLLECTIVES):
        return f"collective {opcode.removesuffix('-start')}"
    return opcode if sum(shape.elements for shape in instruction.shapes) > _SCALAR else None


def _classify(module: Module, instruction: Instruction, place: str) -> tuple[str, str]:
    """Kind and place of an instruction: a fusion is what its matrix product is, or else what most of it is.

    Args:
        module: the program.
        instruction: one with cycles.
        place: of the loop that it stands in, for what has none of its own.
    """
    source = instruction.op_name or place
    if instruction.opcode == "custom-call":
        return (KERNELS if _scope(source) == ATTENTION else _scope(source)), source
    inner = [part for _, part in _inner(module, instruction)]
    products = [i.op_name for i in inner if i.opcode in _PRODUCTS]
    if products:
        if "/attend/" in products[0]:
            return ATTENTION, products[0]
        kind = _scope(products[0])
        return (MATMULS if kind in (ATTENTION, MATMULS, NORMS) else kind), products[0]
    if instruction.opcode in _LAYOUT:
        return COPIES, source
    kind = _scope(source)
    if kind == OTHER:
        votes = Counter()
        for i in inner:
            votes[_scope(i.op_name)] += sum(shape.bytes for shape in i.shapes)
        votes.pop(OTHER, None)
        kind = max(votes, key=lambda name: votes[name], default=OTHER)
    if kind == MATMULS:  # element by element, in a feed-forward
        kind = OTHER
    return kind, source


def _inner(module: Module, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
    """All instructions of a fusion with their computation, those of fusions within it too."""
    name = _called(instruction) if instruction.opcode == "fusion" else None
    if name is None:
        return []
    inside = module.computations[name]
    return [pair for own in inside.instructions.values() for pair in ((inside, own), *_inner(module, own))]


def _scope(op_name: str) -> str:
    return next((kind for kind, pattern in _SCOPES if re.search(pattern, op_name)), OTHER)


def _shape(instruction: Instruction) -> str:
    shapes = [f"{s.dtype}[{','.join(str(size) for size in s.sizes)}]" for s in instruction.shapes]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"

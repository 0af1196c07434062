"""How long a compiled TPU program takes by its compiler's own clock: cycles of every operation, loops multiplied out.

Every fusion and copy of a TPU program carries the compiler's estimate of its cycles. Kernels (custom calls) carry none:
theirs are read off their VLIW programs (``kernel_cycles``). Nothing here was measured.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mor_jax.plan.clock_kernels import KernelCost, base_name, kernel_costs
from mor_jax.plan.hlo import Instruction, Module
from mor_jax.plan.topology import Generation

MATMULS, KERNELS, ATTENTION, NORMS = "block matmuls", "attention kernels", "attention other", "norms"
HEAD, ROUTING, OPTIMISER, COPIES, OTHER = "head and loss", "routing", "optimiser", "copies and layout", "other"
KINDS = (MATMULS, KERNELS, ATTENTION, NORMS, HEAD, ROUTING, OPTIMISER, COPIES, OTHER)
"""What the cycles of a step go into."""
_SCOPES = (  # the first that matches the place in the traced program
    (OPTIMISER, r"optimiser"),
    (HEAD, r"head_loss|/head\b|logits"),
    (ROUTING, r"routing|router|top_k|select_rows|gather_rows|scatter_rows"),
    (NORMS, r"norm"),
    (ATTENTION, r"attention|rotary"),
    (MATMULS, r"ffn|dense|mlp"),
)
_LAYOUT = ("copy", "transpose", "reshape", "broadcast", "bitcast-convert", "slice", "concatenate", "pad")
_PRODUCTS = ("dot", "convolution")
_HIDDEN = ("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done", "async-update")
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
    clock = read_clock(module, kernel_costs(module, dump, generation, rows))
    for path in dump.glob("*.txt"):
        path.unlink()
    return clock


def read_clock(module: Module, kernels: Mapping[str, KernelCost]) -> Clock:
    """Sum the cycles of a compiled program.

    Args:
        module: compiled for a TPU.
        kernels: from ``kernel_costs``; those without are left out.
    """
    found, left_out = [], Counter()
    fused = _fused(module)
    for computation, instruction, times in module.executed():
        if computation.name in fused:
            continue
        kernel = kernels.get(instruction.name)
        cycles = _estimate(instruction) if kernel is None else kernel.cycles
        if cycles is None:
            if reason := _left_out(instruction):
                left_out[reason] += times
        elif cycles:
            kind, source = _classify(module, instruction)
            row = (cycles * times, times, instruction.name, instruction.opcode, kind, _shape(instruction), source)
            found.append(Operation(*row))
    return Clock(tuple(sorted(found, key=lambda operation: -operation.cycles)), left_out, kernels)


def _fused(module: Module) -> set[str | None]:
    """Computations that run inside one instruction, whose estimate has them."""
    return {_called(i) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "fusion"}


def _called(instruction: Instruction) -> str | None:
    found = re.search(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else None


def _estimate(instruction: Instruction) -> int | None:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else None


def _left_out(instruction: Instruction) -> str | None:
    """Name what an instruction without an estimate is; None if it is free or next to it."""
    opcode = instruction.opcode
    if opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
        return f"kernel {base_name(instruction.name)}" if target == "tpu_custom_call" else None
    if opcode in _FREE or opcode.endswith("-done"):
        return None
    if opcode in _HIDDEN:
        return "transfers to and from VMEM, taken to be hidden"
    if opcode.startswith(_COLLECTIVES):
        return f"collective {opcode.removesuffix('-start')}"
    return opcode if sum(shape.elements for shape in instruction.shapes) > _SCALAR else None


def _classify(module: Module, instruction: Instruction) -> tuple[str, str]:
    """Kind and place of an instruction: a fusion is what its matrix product is, or else what most of it is."""
    source = instruction.op_name
    if instruction.opcode == "custom-call":
        return (KERNELS if _scope(source) == ATTENTION else _scope(source)), source
    inner = _inner(module, instruction)
    products = [i.op_name for i in inner if i.opcode in _PRODUCTS]
    if products:
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


def _inner(module: Module, instruction: Instruction) -> list[Instruction]:
    """All instructions of a fusion, those of fusions within it too."""
    name = _called(instruction) if instruction.opcode == "fusion" else None
    if name is None:
        return []
    return [i for own in module.computations[name].instructions.values() for i in (own, *_inner(module, own))]


def _scope(op_name: str) -> str:
    return next((kind for kind, pattern in _SCOPES if re.search(pattern, op_name)), OTHER)


def _shape(instruction: Instruction) -> str:
    shapes = [f"{s.dtype}[{','.join(str(size) for size in s.sizes)}]" for s in instruction.shapes]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"

"""Read compiled HLO text: its computations, their instructions, and how often each of them runs.

``compiled.as_text()`` prints a program after all optimisations. ``cost_analysis()`` counts the body of a loop once;
here every loop is multiplied by its trip count, so that a scan over layers counts as all its layers.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter


@dataclass(frozen=True)
class ArrayShape:
    """Element type and sizes of one array, such as ``bf16[4,128]``."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes without padding; tokens and opaque values have none."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0
        return math.ceil(self.elements * width / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]
    """Arrays of the result: one, or those of a (nested) tuple in order."""
    operands: tuple[str, ...]
    """Names of the operands; empty for constants and parameters."""
    literal: str
    """What stands between the parentheses: the operands, a constant's value, a parameter's number."""
    attributes: str
    """What follows: dimension numbers, called computations, metadata, backend_config."""
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """Value of ``name=value`` (without braces or quotes), None if absent."""
        found = re.search(rf'(?:^|[\s,]){name}=(?:\{{([^{{}}]*)\}}|"([^"]*)"|([^\s,]+))', self.attributes)
        return None if found is None else next(value for value in found.groups() if value is not None)

    def numbers(self, name: str) -> tuple[int, ...]:
        """Integers of a list attribute such as ``lhs_contracting_dims={1}``; empty if absent."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name) or ""))

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, such as ``jit(step)/jvp(Transformer)/...``; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """A list of instructions by name, in the order of printing."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def operand(self, instruction: Instruction, index: int) -> ArrayShape:
        """Shape of an operand that is one array."""
        return self.instructions[instruction.operands[index]].shapes[0]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    unknown_trips: int = 1
    """Rounds of a loop whose trip count the text does not tell."""
    switch: int | None = None
    """The branch that conditionals of more than two branches take; None counts all."""

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs in one run of the program, loops multiplied out.

        Every branch of a conditional counts as taken, but for ``switch``. Scalar functions that an instruction applies
        element by element (reducers, comparators) count as never run. A loop without a known trip count
        (``unknown_loops``) runs ``unknown_trips`` times.
        """
        callers: dict[str, dict[str, int]] = {name: {} for name in self.computations}
        for caller, computation in self.computations.items():
            for instruction in computation.instructions.values():
                for callee, times in self.called(instruction):
                    callers[callee][caller] = callers[callee].get(caller, 0) + times
        counts = {}
        for name in TopologicalSorter(callers).static_order():
            own = 1 if name == self.entry else 0
            counts[name] = own + sum(counts[caller] * times for caller, times in callers[name].items())
        return counts

    @property
    def unknown_loops(self) -> tuple[str, ...]:
        """Names of the while instructions whose trip count the text does not tell."""
        loops = (i for c in self.computations.values() for i in c.instructions.values() if i.opcode == "while")
        return tuple(loop.name for loop in loops if self.trip_count(loop) is None)

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """All instructions that run, with their computation and how often."""
        for name, times in self.executions.items():
            if times:
                computation = self.computations[name]
                yield from ((computation, instruction, times) for instruction in computation.instructions.values())

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of a while instruction runs.

        CPU and GPU note it in backend_config. TPU does not: there it is the constant that the condition compares the
        counter of a scan with (from 0 in steps of 1). A condition that calculates has constants of other meanings.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = list(self._with_called(loop.attribute("condition") or ""))
        if any(instruction.opcode not in _COUNTS for instruction in condition):
            return None
        limits = [int(i.literal) for i in condition if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal)]
        return limits[0] if len(limits) == 1 and limits[0] >= 0 else None  # a negative one is no counter's limit

    def _with_called(self, name: str) -> Iterator[Instruction]:
        """Instructions of a computation and of those that it calls."""
        for instruction in self.computations[name.lstrip("%")].instructions.values():
            yield instruction
            for callee in re.findall(r"calls=%?([\w.\-]+)", instruction.attributes):
                yield from self._with_called(callee)

    def called(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often in one run of its own."""
        callees = list(_callees(instruction))
        if instruction.opcode == "conditional" and len(callees) > 2 and self.switch is not None:
            callees = callees[self.switch : self.switch + 1]
        trips = 1
        if instruction.opcode == "while":
            known = self.trip_count(instruction)
            trips = self.unknown_trips if known is None else known
        yield from ((callee, trips + (keyword == "condition")) for keyword, callee in callees)


_CALLEES = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^{}]*\}|%?[\w.\-]+)"
)
_COUNTS = ("parameter", "get-tuple-element", "constant", "compare", "fusion", "bitcast", "copy", "tuple")
"""What is in a loop's condition that compares a counter with a limit."""
_APPLIES_WHOLE = ("call", "async-start")  # elsewhere to_apply is a scalar function


def _callees(instruction: Instruction) -> Iterator[tuple[str, str]]:
    if instruction.opcode in ("async-update", "async-done"):  # name again what async-start calls
        return
    for keyword, names in _CALLEES.findall(instruction.attributes):
        if keyword == "to_apply" and instruction.opcode not in _APPLIES_WHOLE:
            continue
        yield from ((keyword, name) for name in re.findall(r"[\w.\-]+", names))


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def parse(text: str) -> Module:
    """Parse what ``compiled.as_text()`` prints.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _whole_lines(text):
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], line[found.end() :], is_root=bool(found[1]))
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those joined that the attributes of a TPU's kernel are broken into."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")) and whole:
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    """Parse ``SHAPE OPCODE(OPERANDS), ATTRIBUTES``."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    opcode, literal = rest[end:opening].strip(), rest[opening + 1 : closing - 1]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, opcode, _shapes(rest[:end]), operands, literal, rest[closing:].lstrip(", "), is_root)


def _closing(text: str, opening: int) -> int:
    """Index behind the parenthesis that closes the one at ``opening``."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _shapes(text: str) -> tuple[ArrayShape, ...]:
    """Arrays of ``f32[2,3]{1,0}`` or of a tuple; layouts and comments are left out."""
    arrays = re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", text)
    return tuple(ArrayShape(dtype, tuple(int(n) for n in re.findall(r"\d+", sizes))) for dtype, sizes in arrays)

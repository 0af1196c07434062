"""Run the scalar part of a kernel's VLIW program, as the TPU compiler dumps it: one bundle is one cycle.

Loop counters, predicates and the addresses of tables are scalars, so loops count as often as they run and predicated
regions as often as they are taken. Vectors are not computed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mor_jax.plan.bundles import Op, Program, names

Table = np.ndarray
_DELAY = 4
"""Bundles behind a branch that run whether it is taken or not."""
_GRANULE = 32
"""Bytes that transfers are counted in."""
_LANES = 128
_MOST = 100_000_000
"""Bundles after which a loop is taken to be endless."""


@dataclass
class Count:
    """What one execution of a kernel takes."""

    bundles: int = 0
    """Bundles that ran."""
    transferred: int = 0
    """Bytes between the device's memory and the core."""
    guesses: int = 0
    """Branches whose predicate is not known here: their region counted as taken, a loop as run once."""


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd.s32": lambda a, b: a + b,
    "ssub.s32": lambda a, b: a - b,
    "smul.u32": lambda a, b: a * b,
    "smul.s32": lambda a, b: a * b,
    "smulhi.u32": lambda a, b: _unsigned(a) * _unsigned(b) >> 32,
    "sshll.u32": lambda a, b: a << (b & 31),
    "sshrl.u32": lambda a, b: _unsigned(a) >> (b & 31),
    "sshra.s32": lambda a, b: a >> (b & 31),
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "smin.u32": lambda a, b: min(_unsigned(a), _unsigned(b)),
    "smax.u32": lambda a, b: max(_unsigned(a), _unsigned(b)),
    "smin.s32": min,
    "smax.s32": max,
    "por": lambda a, b: int(bool(a) or bool(b)),
    "pand": lambda a, b: int(bool(a) and bool(b)),
    "pnand": lambda a, b: int(not (a and b)),
    "pnor": lambda a, b: int(not (a or b)),
    "pxor": lambda a, b: int(bool(a) != bool(b)),
}
_COPIES = ("smov", "pmov", "int_to_ptr", "sphi")
_TRANSFERS = {"dma.hbm_to_vmem", "dma.vmem_to_hbm", "dma.hbm_to_smem", "dma.smem_to_hbm", "dma.hbm_to_hbm"}


def needed(program: Program) -> set[str]:
    """Results that decide how often a bundle or a transfer happens, and what these are made of."""
    wanted, found = set(), set()
    for bundle in program.bundles:
        for op in bundle:
            if op.name == "sbr.rel" or op.name in _TRANSFERS:
                wanted |= set(re.findall(r"%(\w+)", " ".join((op.guard, *op.arguments[1:2]))))
    stores: dict[str, list[Op]] = {}
    for op in (op for bundle in program.bundles for op in bundle if op.name == "sst"):
        stores.setdefault(_allocation(op.arguments[0]), []).append(op)
    while wanted:
        name = wanted.pop()
        found.add(name)
        op = program.definitions.get(name)
        if op is None:
            continue
        more = set(names(op))
        if op.name == "sld":
            more |= {n for store in stores.get(_allocation(op.arguments[0]), []) for n in names(store)}
        wanted |= more - found
    return found


def _allocation(place: str) -> str:
    found = re.search(r"#(\w+)", place)
    return found[1] if found else ""


@dataclass
class _Machine:
    """Scalar registers and memory; what is not known is None or absent."""

    tables: dict[str, Table]
    values: dict[str, int | None] = field(default_factory=dict)
    memory: dict[tuple[str, int], int | None] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    clock: int = 0

    def value(self, text: str) -> int | None:
        if text.startswith("!"):
            value = self.value(text[1:])
            return None if value is None else int(not value)
        if text.startswith("%"):
            return self.values.get(text[1:])
        return _signed(int(text)) if re.fullmatch(r"-?\d+", text) else None

    def place(self, text: str) -> tuple[str, int] | None:
        name, offset = _allocation(text), 0
        for term in re.findall(r"\+ ([^\s\]]+)", text):
            value = int(term, 16) if term.startswith("0x") else self.value(term)
            if value is None:
                return None
            offset += value
        return name, offset

    def load(self, text: str) -> int | None:
        place = self.place(text)
        if place is None:
            return None
        if (table := self.tables.get(place[0])) is None:
            return self.memory.get(place, 0 if place[0] == "allocation0" else None)  # the number of the core
        if table.ndim == 1:
            return int(table[place[1]]) if 0 <= place[1] < table.size else None
        rows, lanes = table.reshape(-1, table.shape[-1]), -(-table.shape[-1] // _LANES) * _LANES
        row, lane = divmod(place[1], lanes)  # rows are filled up to whole registers
        return int(rows[row, lane]) if 0 <= row < len(rows) and lane < rows.shape[1] else None

    def execute(self, op: Op, back: bool) -> None:
        if op.guard and self.value(op.guard) == 0:
            return
        if op.name == "sst":
            if (place := self.place(op.arguments[0])) is not None:
                self.memory[place] = self.value(op.arguments[1])
        elif op.result:
            self.clock += 1
            self.values[op.result] = self.result(op, back)
            self.times[op.result] = self.clock

    def result(self, op: Op, back: bool) -> int | None:
        name, arguments = op.name, op.arguments
        if name == "sphi":  # of a loop: before it, or from its last round; elsewhere what was made last
            if len(arguments) == 2 and back:
                return self.value(arguments[1])
            known = [a for a in arguments if a.lstrip("%") in self.times]
            return self.value(max(known, key=lambda a: self.times[a.lstrip("%")])) if known else None
        if name == "sld":
            return self.load(arguments[0])
        if name in ("select", "scalar_select"):
            chosen = self.value(arguments[0])
            return None if chosen is None else self.value(arguments[1 if chosen else 2])
        if name.split(".")[0] in _COPIES:
            return self.value(arguments[-1])
        values = [self.value(argument) for argument in arguments]
        if name == "pneg":
            return None if values[0] is None else int(not values[0])
        if len(values) != 2:
            return None
        return self.binary(name, *values)

    @staticmethod
    def binary(name: str, a: int | None, b: int | None) -> int | None:
        for known in (a, b):  # one side decides
            if known is not None and {"por": known, "pnor": known, "pand": not known, "pnand": not known}.get(name):
                return int(name in ("por", "pnand"))
        if a is None or b is None:
            return None
        if name.startswith("scmp."):
            _, relation, kind, *_ = name.split(".")
            a, b = (_unsigned(a), _unsigned(b)) if kind == "u32" else (a, b)
            return int(_COMPARE[relation](a, b)) if relation in _COMPARE else None
        return _signed(_ARITHMETIC[name](a, b)) if name in _ARITHMETIC else None


def count(program: Program, tables: Mapping[int, Table]) -> Count:
    """Count what one execution of a kernel takes.

    Args:
        program: from ``parse``.
        tables: integer arrays that the kernel reads at run time, by the index of the operand.

    Raises:
        ValueError: it does not end.
    """
    wanted, counted = needed(program), Count()
    machine = _Machine(_placed(program, tables))
    events = [
        tuple(o for o in b if o.result in wanted or o.name in ("sst", "sbr.rel") or o.name in _TRANSFERS)
        for b in program.bundles
    ]
    at, back, size = 0, False, len(events)
    while at < size:
        counted.bundles += 1
        target = None
        for op in events[at]:
            if op.name == "sbr.rel":
                target = _target(program, machine, op, at, counted)
            elif op.name in _TRANSFERS:
                _transfer(machine, op, counted)
            else:
                machine.execute(op, back)
        back = False
        if target is None:
            at += 1
            continue
        for late in range(at + 1, min(at + 1 + _DELAY, size)):
            for op in events[late]:
                if op.name != "sphi" and op.name != "sbr.rel" and op.name not in _TRANSFERS:
                    machine.execute(op, back=False)
            counted.bundles += 1
        back, at = target <= at, target
        if counted.bundles > _MOST:
            raise ValueError(f"a kernel's program does not end within {_MOST} bundles")
    return counted


def _target(program: Program, machine: _Machine, op: Op, at: int, counted: Count) -> int | None:
    """Bundle that a branch goes to, None if it goes on."""
    label = re.search(r"\$region\d+", " ".join(op.arguments))
    target = program.labels.get(label[0]) if label else None
    taken = machine.value(op.guard) if op.guard else 1
    if taken is None:
        counted.guesses += 1
        return None
    return target if taken else None


def _transfer(machine: _Machine, op: Op, counted: Count) -> None:
    if op.guard and machine.value(op.guard) == 0:
        return
    counted.transferred += _GRANULE * (machine.value(op.arguments[1]) or 0)


def _placed(program: Program, tables: Mapping[int, Table]) -> dict[str, Table]:
    """Tables by the allocation of scalar memory that they are copied to first."""
    found = {}
    for op in (op for bundle in program.bundles for op in bundle):
        if op.name in ("dma.hbm_to_smem", "dma.vmem_to_smem"):
            source, place = _origin(program, op.arguments[0]), _origin(program, op.arguments[2])
            index = re.search(r"index: (\d+)", source)
            if index and int(index[1]) in tables and (name := _allocation(place)):
                found[name] = np.asarray(tables[int(index[1])])
    return found


def _origin(program: Program, text: str) -> str:
    """What an address was made of at first."""
    while text.startswith("%") and (op := program.definitions.get(text[1:])) is not None:
        if op.name.startswith("inlined_call_operand"):
            return " ".join(op.arguments)
        text = op.arguments[0]
    return text

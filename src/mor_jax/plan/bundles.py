"""The scalar part of a kernel's VLIW program, as the TPU compiler dumps it: read from text."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter


@dataclass(frozen=True)
class Op:
    """One operation of a bundle."""

    name: str
    result: str
    guard: str
    """Predicate under which it happens, perhaps after `!`; empty is always."""
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A kernel's bundles, of which only scalar operations, branches and transfers are kept."""

    bundles: tuple[tuple[Op, ...], ...]
    labels: Mapping[str, int]
    """First bundle of each region."""
    shapes: Mapping[int, tuple[int, ...]]
    """Of the operands, results behind them."""

    @functools.cached_property
    def definitions(self) -> dict[str, Op]:
        """Operations by their result."""
        return {op.result: op for bundle in self.bundles for op in bundle if op.result}


_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{(.*?)\}", re.MULTILINE | re.DOTALL)
_OP = re.compile(r"(?:%(\w+) = )?([a-z_]+[\w.]*)\s*(.*)", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_ENDS = re.compile(r"[,]\s*(?![^\[]*\])")


def parse(text: str) -> Program:
    """Parse a file `*-final_bundles.txt` of the compiler's dump.

    Raises:
        ValueError: there is no bundle in it.
    """
    shapes = {
        int(index): tuple(int(size) for size in sizes.split(",") if size)
        for sizes, index in re.findall(r"\[shape: \w+\[([\d,]*)\], index: (\d+),", text)
    }
    marks = lambda found: "".join(f"@{number}@" for number in _REGION.findall(found[0]))  # noqa: E731
    plain = re.sub(r"/\*.*?\*/", marks, text, flags=re.DOTALL)
    plain = re.sub(r", shape index: \{[^}]*\}", "", plain)  # braces are those of bundles from here on
    bundles, labels, ends = [], {}, [found.start() for found in _BUNDLE.finditer(plain)]
    for found, end in zip(_BUNDLE.finditer(plain), [*ends[1:], len(plain)], strict=True):
        for number in re.findall(r"@(\d+)@", plain[found.start() : end]):
            labels.setdefault(f"$region{number}", len(bundles))
        bundles.append(_ordered([op for part in found[2].split(";;") if (op := _op(part.strip())) is not None]))
    if not bundles:
        raise ValueError("no bundle in the program's text")
    return Program(tuple(bundles), labels, shapes)


def _op(text: str) -> Op | None:
    found = _OP.match(re.sub(r"@\d+@", "", text))
    if found is None:
        return None
    result, name, rest = found[1] or "", found[2], found[3].strip()
    if name.startswith("v") or re.match(r"v\d", result):
        return None
    guard = re.match(r"(?:\[thread:\$\d+\]\s*)?\((!?%\w+)\)[,\s]*", rest)
    if name == "smov" and (chosen := re.match(r"\((!?%\w+), ([^)]*)\), (.*)", rest)):
        return Op("select", result, "", (chosen[1], chosen[3].strip(), chosen[2].strip()))
    if guard:
        rest = rest[guard.end() :]
    rest = re.sub(r"^\[(thread|resolvable):[^\]]*\]\s*", "", rest)
    if name == "sst":  # place and value stand side by side
        rest = ", ".join(rest.rsplit(" ", 1))
    return Op(name, result, guard[1] if guard else "", tuple(part.strip() for part in re.split(_ENDS, rest) if part))


def _ordered(ops: list[Op]) -> tuple[Op, ...]:
    """Operations of a bundle such that a value is made before it is used; phis first, a branch last."""
    makers = {op.result: op for op in ops if op.result}
    graph = {op: {makers[n] for n in names(op) if n in makers and makers[n] != op and op.name != "sphi"} for op in ops}
    order = TopologicalSorter(graph).static_order()
    return tuple(sorted(order, key=lambda op: (op.name != "sphi", op.name == "sbr.rel")))


def names(op: Op) -> list[str]:
    return re.findall(r"%(\w+)", " ".join((op.guard, *op.arguments)))

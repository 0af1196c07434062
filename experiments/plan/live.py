"""What a scheduled program holds at its peak, and how many different fusions it has: `python live.py FILE ...`.

FILE is what the TPU compiler leaves when it has scheduled a program, before it makes code of it (the long part): run
`mor plan` with `LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true"` and take `FOLDER/*TLP-hlo.txt`,
after which the run may be stopped. The walk counts temporaries in HBM padded to tiles; the compiler adds what it cannot
place better. Arguments of the program are not counted. Code of equal fusions is made once.
"""

import argparse
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](?:\{([^}]*)\})?")
_SAME = ("tuple", "bitcast", "optimization-barrier", "while")
_SHOWN = 30


@dataclass
class Line:
    """One instruction."""

    name: str
    result: str
    opcode: str
    operands: list[str]
    rest: str

    def called(self, keyword: str) -> str:
        """Name of a computation that it runs."""
        found = re.search(rf"{keyword}=%?([\w.\-]+)", self.rest)
        assert found is not None, self.name
        return found[1]

    @property
    def source(self) -> str:
        """Place in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def _closing(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    raise ValueError(text[:80])


def read(text: str) -> tuple[dict[str, list[Line]], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, list[Line]] = {}
    entry, current = "", []
    for row in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", row)
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", row)
        if head:
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found:
            after = row[found.end() :]
            split = _closing(after, 0) if after.startswith("(") else after.index(" ")
            call = re.match(r"\s*([\w\-]+)\(", after[split:])
            assert call is not None, row[:120]
            opened = split + call.end() - 1
            end = _closing(after, opened)
            operands = re.findall(r"%([\w.\-]+)", after[opened:end])
            current.append(Line(found[1], after[:split], call[1], operands, after[end:]))
    return computations, entry


def sizes(result: str) -> list[int]:
    """Bytes in HBM of every array of a result, padded to the tiles of its layout; 0 in vector memory."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(result):
        axes = [int(size) for size in dims.split(",") if size]
        order = layout.split(":")[0]
        axes = [axes[int(axis)] for axis in order.split(",") if axis] if order else axes[::-1]
        tile = re.search(r"T\((\d+),(\d+)\)", layout)
        if tile and len(axes) > 1:
            axes[0] = -(-axes[0] // int(tile[2])) * int(tile[2])
            axes[1] = -(-axes[1] // int(tile[1])) * int(tile[1])
        found.append(0 if re.search(r"S\([1-9]\)", layout) else math.prod(axes) * _BYTES[dtype])
    return found


def _elements(result: str) -> list[int]:
    """How many arrays each element of a tuple has."""
    parts, depth, start = [], 0, 1
    for index in range(1, len(result) - 1):
        depth += (result[index] in "({[") - (result[index] in ")}]")
        if result[index] == "," and depth == 0:
            parts.append(result[start:index])
            start = index + 1
    return [len(_ARRAY.findall(part)) for part in [*parts, result[start:-1]]]


def _buffers(line: Line, held: dict[str, list], results: dict[str, str], own: dict) -> list:
    """The buffers that an instruction's result lies in: new ones, or those of an operand."""
    arrays = sizes(line.result)
    if line.opcode == "parameter":
        return [("argument", line.name, index) for index in range(len(arrays))]
    given = [buffer for operand in line.operands for buffer in held.get(operand, [])]
    if line.opcode == "get-tuple-element":
        found = re.search(r"index=(\d+)", line.rest)
        widths, index = _elements(results[line.operands[0]]), int(found[1]) if found else 0
        return given[sum(widths[:index]) : sum(widths[: index + 1])]
    if line.opcode in _SAME:
        return given
    if line.opcode.endswith(("-done", "-update")):  # of what was started: the latest buffer of that size
        chosen = []
        for index, size in enumerate(arrays):
            fitting = [b for b in given if own.get(b) == size and b not in chosen]
            fitting = [b for b in fitting if b[1] == line.operands[0]] or fitting
            chosen.append(fitting[-1] if fitting else ("new", line.name, index))
        return chosen
    return [("new", line.name, index) for index in range(len(arrays))]


def walk(computations: dict[str, list[Line]], name: str) -> tuple[int, Line, dict]:
    """(bytes at the peak, the instruction there, what is held then: bytes by buffer) of one computation."""
    body = computations[name]
    held: dict[str, list] = {}
    results = {line.name: line.result for line in body}
    own: dict = {}
    ends: dict = {}
    for place, line in enumerate(body):
        held[line.name] = _buffers(line, held, results, own)
        for buffer, size in zip(held[line.name], sizes(line.result), strict=False):
            own.setdefault(buffer, size if buffer[0] == "new" else 0)
            ends.setdefault(buffer, place)
        if line.opcode not in ("get-tuple-element", "tuple", "bitcast"):
            ends.update((buffer, place) for operand in line.operands for buffer in held.get(operand, []))
    ending = defaultdict(list)
    for buffer, place in ends.items():
        ending[place].append(buffer)
    live: dict = {}
    best: tuple[int, Line, dict] = (0, body[0], {})
    for place, line in enumerate(body):
        new = [b for b in held[line.name] if b[:2] == ("new", line.name) and b not in live]
        in_place = '"aliasing_operands":{"lists":[{' in line.rest or "output_to_operand_aliasing" in line.rest
        if in_place or "dynamic-update-slice" in line.name:  # may write where an operand ends
            for buffer in new:
                over = next((b for b in ending[place] if b in live and own[b] == own[buffer] > 0), None)
                live.pop(over, None)
        live |= {buffer: own[buffer] for buffer in new}
        inner = walk(computations, line.called("body"))[0] if line.opcode == "while" else 0
        if sum(live.values()) + inner > best[0]:
            best = (sum(live.values()) + inner, line, dict(live))
        for buffer in ending[place]:
            live.pop(buffer, None)
    return best


def fusions(computations: dict[str, list[Line]], entry: str) -> list[str]:
    """The text of every fusion that is executed, its names made equal."""

    def text(name: str) -> str:
        numbers = {line.name: f"v{place}" for place, line in enumerate(computations[name])}
        rows = []
        for line in computations[name]:
            inner = [text(c) for c in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line.rest) if c in computations]
            rest = re.sub(r", (metadata|backend_config|frontend_attributes|origin|control-pred).*$", "", line.rest)
            rest = re.sub(r"(calls|to_apply)=%?[\w.\-]+", "", rest)
            rows.append(f"{line.result} {line.opcode} {[numbers.get(o) for o in line.operands]} {rest} {inner}")
        return "\n".join(rows)

    names, found = [entry], []
    for name in names:
        by_name = {line.name: line.result for line in computations[name]}
        for line in computations[name]:
            if line.opcode == "while":
                names += [line.called("body")]
            if line.opcode == "fusion":
                found.append(f"{text(line.called('calls'))} {line.result} {[by_name[o] for o in line.operands]}")
    return found


def main() -> None:
    """Print the peak of every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        computations, entry = read(path.read_text(encoding="utf-8"))
        peak, line, live = walk(computations, entry)
        texts = fusions(computations, entry)
        products = [text for text in texts if re.search(r" (dot|convolution) \[", text)]
        print(f"{path}: {peak / 2**30:.2f} GiB at {line.name} {line.source}")
        print(f"{len(texts)} fusions, {len(set(texts))} different; with products {len(products)}, {len(set(products))}")
        by_name = {line.name: line for line in computations[entry]}
        for (_, name, index), size in sorted(live.items(), key=lambda item: -item[1])[:_SHOWN]:
            dtype, dims, _ = _ARRAY.findall(by_name[name].result)[index]
            print(f"{size / 2**20:8.1f} MiB {dtype}[{dims}] {name} {by_name[name].source[-90:]}")


if __name__ == "__main__":
    main()

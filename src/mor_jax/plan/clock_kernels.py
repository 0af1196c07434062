"""Cycles of the kernels in a compiled TPU program, from the dump that the compiler leaves of it.

A kernel takes the larger of its bundles and of the bytes of its blocks over the memory's speed. What it reads at run
time is taken to be that of one document a row and of selected rows that are evenly spread.
Letters: B rows, T queries, S keys, I blocks of queries, J of keys.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mor_jax.kernels.attention.tpu import block_size
from mor_jax.plan import bundle_machine, bundles
from mor_jax.plan.hlo import Computation, Instruction, Module
from mor_jax.plan.topology import Generation

_DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_CORES = {"v5p": 2}
"""Cores of a device: one of them runs the program that is counted, and has its part of the memory's speed."""


def dump_into(folder: Path) -> None:
    """Have the TPU compiler dump what it compiles; must come before libtpu is loaded."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_DUMP.format(folder=folder)}".strip()


@dataclass(frozen=True)
class KernelCost:
    """One execution of a kernel."""

    bundles: int
    transferred: int
    """Bytes between the device's memory and its cores."""
    memory_cycles: int
    """What these bytes take at the memory's peak."""
    guesses: int
    """Branches that run-time data decides and that are not known here."""

    @property
    def cycles(self) -> int:
        """The larger of the two."""
        return max(self.bundles, self.memory_cycles)


def kernel_costs(module: Module, dump: Path, generation: Generation, rows: int) -> dict[str, KernelCost]:
    """Read what the kernels of a program take, by the name of their instruction.

    Args:
        module: compiled for a TPU.
        dump: folder with the files `*-final_bundles.txt` of that compilation.
        generation: of the device.
        rows: B, of one device and micro-batch.

    Returns:
        Kernels whose program is in the folder, if perhaps under the name of an equal one: the compiler dumps it once.
    """
    files = {found[1]: path for path in sorted(dump.iterdir()) if (found := _FILE.fullmatch(path.name))}
    programs: dict[str, bundles.Program] = {}
    costs: dict[str, KernelCost] = {}
    for computation, instruction, _ in module.executed():
        if instruction.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
            continue
        base = base_name(instruction.name)
        names = sorted((name for name in files if base_name(name) == base), key=lambda n: n != instruction.name)
        for name in names:
            if name not in programs:
                programs[name] = bundles.parse(files[name].read_text())
            if name == instruction.name or _shapes(programs[name]) == _operands(computation, instruction):
                tables = run_time_tables(base, _operands(computation, instruction), rows)
                costs[instruction.name] = _cost(programs[name], tables, generation)
                break
    return costs


def base_name(name: str) -> str:
    """Strip the numbers that make an instruction's name unique."""
    return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", name)


def _shapes(program: bundles.Program) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for _, shape in sorted(program.shapes.items()))


def _operands(computation: Computation, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Shapes of the operands and results."""
    found = [computation.instructions[name].shapes[0] for name in instruction.operands]
    return tuple(shape.sizes for shape in (*found, *instruction.shapes))


def _cost(program: bundles.Program, tables: dict[int, np.ndarray], generation: Generation) -> KernelCost:
    counted = bundle_machine.count(program, tables)
    memory = round(counted.transferred / bytes_per_cycle(generation))
    return KernelCost(counted.bundles, counted.transferred, memory, counted.guesses)


def bytes_per_cycle(generation: Generation) -> float:
    """What a core and the memory exchange at most in a cycle."""
    clock = generation.chip.clock_hz
    assert clock is not None
    return generation.chip.hbm_rate / _CORES.get(generation.name, 1) / clock


def run_time_tables(kernel: str, shapes: tuple[tuple[int, ...], ...], rows: int) -> dict[int, np.ndarray]:
    """Make the tables that a known kernel of attention reads, for one document a row and evenly spread queries.

    Args:
        kernel: name without number.
        shapes: of its operands.
        rows: B.
    """
    if kernel.startswith("splash_mha"):  # blocks to fetch, and whether to compute
        _, first, second = shapes[0]
        by_key = "dkv" in kernel
        blocks_q, blocks_k = (first, second // rows) if by_key else (first // rows, second)
        visible_IJ = _visible(blocks_q, blocks_k)
        base_B11 = np.arange(rows)[:, None, None]
        if by_key:
            next_BIJ = base_B11 * blocks_q + _nearest(visible_IJ, 0)
        else:
            next_BIJ = base_B11 * blocks_k + _nearest(visible_IJ, 1)
        pair = (next_BIJ, np.broadcast_to(visible_IJ.astype(int), next_BIJ.shape))
        folded = (x.transpose(1, 0, 2) if by_key else x for x in pair)
        return {index: np.ascontiguousarray(x).reshape(shapes[0]) for index, x in enumerate(folded)}
    if kernel.startswith("mosaic_tpu_attention"):  # first block of keys, past the last, and those without a mask
        batch, _, keys = shapes[2]
        blocks_q, blocks_k = shapes[0][0] // 4 // batch, -(-keys // block_size(keys))
        ends = (np.arange(blocks_q) + 1) * blocks_k / blocks_q
        past_I, full_I = np.ceil(ends).astype(int), np.floor(np.arange(blocks_q) * blocks_k / blocks_q).astype(int)
        table_I4 = np.stack([np.zeros(blocks_q, int), past_I, np.zeros(blocks_q, int), full_I], axis=1)
        return {0: np.tile(table_I4.reshape(-1), batch)}
    return {}


def _visible(blocks_q: int, blocks_k: int) -> np.ndarray:
    """bool [I, J]: the last query of a block sees the first key of a block, were both evenly spread over a row."""
    first_J, past_I = np.arange(blocks_k) / blocks_k, (np.arange(blocks_q) + 1) / blocks_q
    return first_J[None, :] < past_I[:, None]


def _nearest(visible_IJ: np.ndarray, axis: int) -> np.ndarray:
    """Index along an axis, clipped to between its first and its last visible block."""
    size = visible_IJ.shape[axis]
    index_IJ = np.indices(visible_IJ.shape)[axis]
    first = np.min(np.where(visible_IJ, index_IJ, size - 1), axis=axis, keepdims=True)
    last = np.max(np.where(visible_IJ, index_IJ, 0), axis=axis, keepdims=True)
    return np.clip(index_IJ, first, np.maximum(first, last))

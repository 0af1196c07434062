"""Where the time of a step goes, by kind of work: a trace whose kernels are traced back to the model's named scopes."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from jax.sharding import Mesh

from mor_jax.bench.beside_clock import beside_clock
from mor_jax.bench.communication import KernelEvent, collective_kind, communication
from mor_jax.config import Config
from mor_jax.train.step import compile_train_step

_log = logging.getLogger(__name__)

KINDS: Sequence[str] = (
    "attention",
    "block matmuls",
    "block other",
    "head + loss",
    "routing",
    "embedding",
    "optimiser",
    "communication",
    "other",
)
"""`block other` is what layers do beside matrix products and attention: norms, rotary embedding, SwiGLU where it is no
matmul's epilogue, residuals."""

DUMP = "dump"
"""Where in a profile's folder a TPU's compiler leaves its kernels' programs."""
_STEPS = 3
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_TPU_EVENT = re.compile(r"%?([\w.\-]+)(?: = |$)")
"""A TPU's event is named by its instruction, perhaps all of its text."""
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_GEMM = re.compile(r'custom_call_target="__cublas|__triton_gemm|__triton_nested_gemm|custom_call_target="__cutlass')
_MATMUL_KERNEL = re.compile(r"/mor_hopper_gate_up_swiglu(_gradient)?/")
_LAYER = re.compile(r"/(block|first|last)/|/(attention|ffn|attention_norm|ffn_norm)/")


@dataclass(frozen=True)
class Instruction:
    """What the compiled program says about one kernel."""

    scope: str
    """The named scopes it came from."""
    is_matmul: bool
    is_control: bool = False
    """Whether it is a loop, call or branch, whose time is that of the kernels inside."""
    is_collective: bool = False
    """Whether devices exchange something."""


def read_instructions(hlo: str) -> dict[str, Instruction]:
    """Index a compiled program's text by instruction name; a fusion is a matmul if it contains one."""
    found: dict[str, Instruction] = {}
    calls: dict[str, str] = {}
    with_dot: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, opcode = match[1], match[2]
        scope = _OP_NAME.search(line)
        is_matmul = opcode in ("dot", "convolution") or _GEMM.search(line) is not None
        if is_matmul:
            with_dot.add(computation)
        is_control = opcode in ("while", "call", "conditional")
        is_collective = collective_kind(name if opcode == "async-start" else opcode) is not None
        found[name] = Instruction(scope[1] if scope else "", is_matmul, is_control, is_collective)
        called = _CALLS.search(line)
        if called:
            calls[name] = called[1]
    for name, called in calls.items():
        if called in with_dot:
            found[name] = replace(found[name], is_matmul=True)
    return found


def kind_of(instruction: Instruction | None) -> str:
    """Classify a kernel; one of ``KINDS``."""
    if instruction is None:
        return "other"
    if instruction.is_collective:
        return "communication"
    scope = instruction.scope
    for part, kind in (
        ("optimiser", "optimiser"),
        ("head_loss", "head + loss"),
        ("/attend/", "attention"),
        ("/embed/", "embedding"),
    ):
        if part in scope:
            return kind
    if _MATMUL_KERNEL.search(scope) or (instruction.is_matmul and "routing" not in scope):
        return "block matmuls"
    if _LAYER.search(scope):
        return "block other"
    return "routing" if "routing" in scope else "other"


def kernel_events(trace: Any) -> list[KernelEvent]:
    """Every kernel in a trace: streams of a GPU, operations of a TPU's core, threads of a CPU."""
    planes = list(trace.planes)
    devices = [p for p in planes if p.name.startswith("/device:")] or [p for p in planes if p.name == "/host:CPU"]
    events = []
    for device, line in ((plane.name, line) for plane in devices for line in plane.lines):
        for event in line.events:
            operation = next((str(value) for name, value in event.stats if name == "hlo_op"), None)
            if operation is None and line.name == "XLA Ops" and (named := _TPU_EVENT.match(event.name)):
                operation = named[1]
            if event.name.startswith("nccl") and collective_kind(operation or "") is None:
                operation = event.name  # launched by a thread that XLA does not name the instruction to
            if operation is not None:
                events.append(KernelEvent(device, operation, event.start_ns * 1e-9, event.duration_ns * 1e-9))
    return events


def time_by_kind(events: list[tuple[str, float]], instructions: Mapping[str, Instruction]) -> dict[str, float]:
    """Sum the seconds of the kernels by kind."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for operation, duration in events:
        seconds[_kind_of(operation, instructions)] += duration
    return seconds


def _kind_of(operation: str, instructions: Mapping[str, Instruction]) -> str:
    """Classify a kernel by its instruction; one that the program does not have may be a collective by its name."""
    if operation not in instructions and collective_kind(operation) is not None:
        return "communication"
    return kind_of(instructions.get(operation))


def profile_step(config: Config, mesh: Mesh, state: Any, batches: list[Any], folder: Path) -> dict[str, Any]:
    """Trace a few steps into ``folder`` and sum the kernels' time by kind, per step and device of this process.

    The step is compiled again without CUDA graphs, whose kernels a trace cannot attribute; so the sum differs a little
    from the step time measured without the profiler.

    Returns:
        `seconds_by_kind`, their `share` of all kernel time, the `top` kernels, the `communication` of every device, and
        on a TPU what its compiler had predicted (`beside_clock`).
    """
    if mesh.devices.flat[0].platform == "gpu":
        options = (*(config.perf.compiler_options or ()), "xla_gpu_enable_command_buffer=")
        config = replace(config, perf=replace(config.perf, compiler_options=options))
    step: Any = compile_train_step(config, mesh)
    state, metrics = step(state, batches[0])
    jax.block_until_ready(metrics)
    with jax.profiler.trace(str(folder)):
        for index in range(_STEPS):
            state, metrics = step(state, batches[index % len(batches)])
        jax.block_until_ready(metrics)
    hlo = step.as_text()
    (folder / "step.hlo.txt").write_text(hlo, encoding="utf-8")
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    instructions = read_instructions(hlo)
    kernels = [
        kernel
        for kernel in kernel_events(ProfileData.from_file(str(newest)))
        if (named := instructions.get(kernel.operation)) is None or not named.is_control
    ]
    shared_by = _STEPS * len(mesh.local_devices)
    events = [(kernel.operation, kernel.seconds / shared_by) for kernel in kernels]
    by_kind = time_by_kind(events, instructions)
    beside = _beside_clock(kernels, hlo, folder / DUMP, config, mesh)
    total = sum(by_kind.values())
    return {
        "seconds_by_kind": by_kind,
        "share_by_kind": {kind: seconds / total if total else 0.0 for kind, seconds in by_kind.items()},
        "kernel_seconds": total,
        "top": top_kernels(events, instructions),
        "communication": communication(kernels, _STEPS),
        **({} if beside is None else {"beside_clock": beside}),
    }


def _beside_clock(
    kernels: Sequence[KernelEvent], text: str, dump: Path, config: Config, mesh: Mesh
) -> dict[str, Any] | None:
    try:
        return beside_clock(kernels, text, dump, config, mesh, _STEPS)
    except (ValueError, LookupError, AssertionError) as error:  # a compiler's new notation must not cost the timing
        _log.warning("the clock cannot read the compiled step: %s", error)
        return None


def top_kernels(
    events: list[tuple[str, float]], instructions: Mapping[str, Instruction], count: int = 40
) -> list[dict[str, Any]]:
    """The kernels that take the most time, grouped by kind and scope (layer numbers are not told apart)."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for operation, seconds in events:
        instruction = instructions.get(operation)
        label = instruction.scope if instruction and instruction.scope else operation
        groups[_kind_of(operation, instructions), label].append(seconds)
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"kind": kind, "scope": scope, "seconds": sum(durations), "kernels": len(durations)}
        for (kind, scope), durations in ranked
    ]

"""Compile the real train step for a slice of TPUs that need not be there."""

import dataclasses
import functools
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mor_jax.config import Config, Stage
from mor_jax.errors import UserError
from mor_jax.kernels.attention.backend import TPU_KERNELS
from mor_jax.mesh.devices import GIB
from mor_jax.mesh.mesh import make_mesh
from mor_jax.perf import resolve_perf
from mor_jax.plan import hlo
from mor_jax.plan.clock import Clock, clock_of
from mor_jax.plan.memory import DeviceMemory, measure_memory, tokens_per_device
from mor_jax.plan.topology import Topology
from mor_jax.runs.state import abstract_train_state
from mor_jax.train.step import compile_train_step


class DoesNotFitError(UserError):
    """The compiler found that the step exceeds a device's memory."""

    def __init__(self, message: str, needed: float | None) -> None:
        super().__init__(message)
        self.needed = needed
        """Bytes that it would need, if the compiler says."""


@dataclass(frozen=True)
class CompiledStep:
    """An executable train step for described devices, and what can be read off it."""

    config: Config
    """Of the run; of an earlier stage of growth that stage's."""
    topology: Topology
    mesh: Mesh
    memory: DeviceMemory
    text: str
    """HLO after all optimisations."""
    seconds: float
    """Wall-clock time of tracing, lowering and compiling."""
    clock: Clock | None = None
    """Cycles, where the compiler left its dump."""

    @functools.cached_property
    def module(self) -> hlo.Module:
        """The parsed program."""
        return hlo.parse(self.text)

    @property
    def attention(self) -> str:
        """Attention that was compiled: the kernel that is in the program, else `xla`."""
        calls = [i.name for _, i, _ in self.module.executed() if i.opcode == "custom-call"]
        return next((kernel for kernel in TPU_KERNELS if any(kernel in call for call in calls)), "xla")


def plan_mesh(config: Config, topology: Topology) -> tuple[Config, Mesh]:
    """Arrange a topology's devices and choose what `perf` leaves open; `mesh.slice` 1 becomes the number of slices.

    Raises:
        UserError: the mesh's sizes do not multiply to the devices.
    """
    if config.mesh.slice == 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=topology.slices))
    mesh = make_mesh(config.mesh, list(topology.devices))
    return dataclasses.replace(config, perf=resolve_perf(config, mesh).asked), mesh


def compile_step(
    config: Config, topology: Topology, stage: Stage | None = None, dump: Path | None = None
) -> CompiledStep:
    """Compile ``train.step.compile_train_step`` for a topology.

    Args:
        config: of the run; everything in it counts, as in training.
        topology: from ``describe_topology``.
        stage: of ``config.stages``; None is the last, which trains the model as configured.
        dump: folder that the compiler leaves its dump in (``clock_kernels.dump_into``), for the clock; emptied.

    Raises:
        DoesNotFitError: it exceeds the memory of a chip.
        UserError: mesh, batch and model do not divide.
    """
    planned, mesh = plan_mesh(config if stage is None else config.of_stage(stage), topology)
    config = dataclasses.replace(config, mesh=planned.mesh, perf=planned.perf)
    state = abstract_train_state(config, mesh)
    start = time.monotonic()
    try:
        executable: Any = compile_train_step(config, mesh, stage)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(str(error)):
            raise
        raise does_not_fit(str(error), topology, "the step") from error
    seconds = time.monotonic() - start
    memory = measure_memory(state, executable.memory_analysis(), topology.generation.program_bytes)
    step = CompiledStep(planned, topology, mesh, memory, executable.as_text(), seconds)
    return step if dump is None else dataclasses.replace(step, clock=step_clock(step, dump))


def step_clock(step: CompiledStep, dump: Path) -> Clock:
    """Read the cycles of a compiled step, and empty the folder of its dump."""
    sizes = {str(axis): size for axis, size in step.mesh.shape.items()}
    rows = tokens_per_device(step.config, sizes) // step.config.model.context_length
    return clock_of(step.module, dump, step.topology.generation, rows)


def is_out_of_memory(message: str) -> bool:
    """Whether a compiler's message says that memory does not suffice."""
    return "RESOURCE_EXHAUSTED" in message or "HbmOom" in message


def does_not_fit(message: str, topology: Topology, what: str) -> DoesNotFitError:
    """Read what the compiler says: `Used 23.41G of 15.75G hbm` or `... (920.87G) exceeds available HBM (15.75G)`.

    Args:
        message: the compiler's.
        topology: compiled for.
        what: subject of the sentence, such as "the step".
    """
    forms = (
        r"[Uu]sed ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm",
        r"\(([\d.]+)([MGT])\) exceeds available HBM \(([\d.]+)([MGT])\)",
    )
    found = next((match for form in forms if (match := re.search(form, message))), None)
    if found is None:
        return DoesNotFitError(f"out of memory: {message.splitlines()[0][:200]}", None)
    used = float(found[1]) * {"M": 1 << 20, "G": GIB, "T": 1 << 40}[found[2]]
    name, limit = topology.generation.name, f"{found[3]} {found[4]}iB"
    return DoesNotFitError(f"out of memory: {what} needs {used / GIB:.2f} GiB of the {limit} of a {name} chip", used)

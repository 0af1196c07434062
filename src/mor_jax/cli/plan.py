"""``mor plan PRESET --topology v5e:8x8 [--slices N] [--field value ...]``: compile for a pod before there is one."""

import json
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor_jax.cli.options import preset_and_flags, refuse_products
from mor_jax.config import Config
from mor_jax.errors import UserError, require
from mor_jax.infer.engine_options import EngineOptions

if TYPE_CHECKING:
    from mor_jax.plan.topology import Topology

_DESCRIPTION = (
    "Compile the real train step ahead of time for TPUs that need not be there, and tell what it will take: memory, "
    "FLOPs, communication, and a bound on its speed. Every field of the configuration counts as in `mor train`."
)


@dataclass(frozen=True)
class PlanFlags:
    """What `mor plan` asks for beside the configuration."""

    topology: str = "v5e:8x8"
    """TPU generation and shape in chips, such as v5e:8x8, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1."""
    slices: int = 1
    """Slices of that shape, joined by the data-center network."""
    json: bool = False
    """Print JSON."""
    decode: bool = False
    """Plan the inference engine on one chip instead of a train step."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """With `--decode`: sizes of the engine."""
    clock: bool = False
    """Read the cycles of the compiled program: by kind, the dearest operations, and what would be attainable."""
    clock_dump: str = ""
    """With `--clock`: read `step.hlo.txt` and the compiler's dump in this folder instead of compiling, so that another
    commit's step can be read (experiments/tpu_clock)."""
    search: bool = False
    """Try mesh shapes, micro-batches and rematerialisations, and show the best that fit."""
    search_compilations: int = 3
    """How many candidates the search compiles; each takes minutes."""


def run(arguments: Sequence[str]) -> int:
    """Print the plan."""
    refuse_products(arguments, "--engine.products")
    config, flags = preset_and_flags(arguments, "plan", _DESCRIPTION, PlanFlags)
    require(flags.decode or flags.engine == EngineOptions(), "--engine.* sizes an engine: it needs --decode")
    require(flags.clock or not flags.clock_dump, "--clock-dump is what --clock reads: it needs --clock")
    require(not flags.clock_dump or not (flags.decode or flags.search), "--clock-dump holds a train step")
    require(not (flags.decode and flags.search), "--search tries meshes of a train step; it does not go with --decode")

    import jax

    from mor_jax.plan.clock_kernels import dump_into

    jax.config.update("jax_platforms", "cpu")  # a host that has a TPU keeps it for others
    # shapes are traced for this host too, whose attention is of no interest; the plan names the one that was compiled
    logging.getLogger("mor_jax.kernels.attention.backend").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) if flags.clock else None
        if dump is not None:
            dump_into(dump)
        return _plan(config, flags, ["mor", "plan", *arguments], dump)


def _plan(config: Config, flags: PlanFlags, command: list[str], dump: Path | None) -> int:
    from mor_jax.plan.topology import describe_topology

    topology = describe_topology(flags.topology, flags.slices)
    if flags.clock_dump:
        return _read(config, topology, flags, command)
    if flags.decode:
        return _decode(config, topology, flags, command, dump)
    if flags.search:
        return _search(config, topology, flags, command, dump)
    return _step(config, topology, flags, command, dump)


def _step(config: Config, topology: "Topology", flags: PlanFlags, command: list[str], dump: Path | None) -> int:
    from mor_jax.plan.compile import DoesNotFitError, compile_step, plan_mesh
    from mor_jax.plan.report import print_report, report
    from mor_jax.plan.run_total import with_run_total
    from mor_jax.plan.search import advise
    from mor_jax.runs.state import abstract_train_state

    planned, mesh = plan_mesh(config, topology)
    abstract_train_state(planned, mesh)  # a mesh that does not divide is refused before anything is compiled
    _say(f"compiling for {topology.label}: minutes")
    try:
        plan = with_run_total(report(compile_step(config, topology, dump=dump), command), config, topology)
    except DoesNotFitError as error:
        raise UserError(f"{error}; {advise(planned, topology)}") from error
    if flags.json:
        print(json.dumps(plan, indent=2))
    else:
        print_report(plan)
    return 0


def _read(config: Config, topology: "Topology", flags: PlanFlags, command: list[str]) -> int:
    from rich.console import Console

    from mor_jax.plan import hlo
    from mor_jax.plan.clock import read_clock
    from mor_jax.plan.clock_kernels import kernel_costs
    from mor_jax.plan.clock_report import clock_tables
    from mor_jax.plan.compile import plan_mesh
    from mor_jax.plan.memory import tokens_per_device
    from mor_jax.plan.report import WIDTH, step_clock

    folder = Path(flags.clock_dump)
    text = folder / "step.hlo.txt"
    require(text.is_file(), f"clock_dump={flags.clock_dump!r} has no file step.hlo.txt")
    planned, mesh = plan_mesh(config, topology)
    sizes, module = {str(axis): size for axis, size in mesh.shape.items()}, hlo.parse(text.read_text())
    rows = tokens_per_device(planned, sizes) // planned.model.context_length
    clock = read_clock(module, kernel_costs(module, folder, topology.generation, rows), topology.generation)
    plan = {
        "command": shlex.join(command),
        "preset": config.preset,
        "topology": {"name": topology.name, "slices": topology.slices, "chips": topology.chips},
        "mesh": sizes,
        "clock": step_clock(clock, planned, sizes, topology),
    }
    if flags.json:
        print(json.dumps(plan, indent=2))
    else:
        Console(width=WIDTH).print(clock_tables(plan["clock"]))
    return 0


def _decode(config: Config, topology: "Topology", flags: PlanFlags, command: list[str], dump: Path | None) -> int:
    from mor_jax.plan.compile import DoesNotFitError
    from mor_jax.plan.decode import advise_decode, compile_decode
    from mor_jax.plan.decode_report import decode_report, print_decode_report

    _say(f"compiling for one chip of {topology.label}: minutes")
    try:
        plan = decode_report(compile_decode(config, topology, flags.engine, dump), command)
    except DoesNotFitError as error:
        raise UserError(f"{error}; {advise_decode(config, topology, flags.engine)}") from error
    if flags.json:
        print(json.dumps(plan, indent=2))
    else:
        print_decode_report(plan)
    return 0


def _search(config: Config, topology: "Topology", flags: PlanFlags, command: list[str], dump: Path | None) -> int:
    from rich.console import Console

    from mor_jax.plan.report import WIDTH, print_report, report
    from mor_jax.plan.search import ranked_plans, search

    fitting, ranked = search(config, topology, flags.search_compilations, dump)
    plans = ranked_plans([report(step, command) for step in fitting])
    if flags.json:
        print(json.dumps({"candidates": len(ranked), "plans": plans}, indent=2))
        return 0
    Console(width=WIDTH).print(_search_table(plans))
    by = "the compiler's clock and the networks' peak" if "clock" in plans[0] else "estimate"
    print(f"{len(ranked)} combinations may fit by estimate; compiled {len(plans)}, fastest by {by} first.\n")
    print_report(plans[0])
    return 0


def _search_table(plans: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from mor_jax.mesh.devices import GIB
    from mor_jax.plan.search import clock_and_network

    table = Table("mesh", "micro-batches", "remat", box=None, pad_edge=False)
    for column in ("GiB per device", "tokens/s at most", "MFU at most", "limit"):
        table.add_column(column, justify="right")
    by_clock = "clock" in plans[0]
    if by_clock:
        for column in ("ms by the clock", "and network"):
            table.add_column(column, justify="right")
    for plan in plans:
        axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        estimate = plan["estimate"]
        times = (plan["clock"]["seconds"], clock_and_network(plan)) if by_clock else ()
        table.add_row(
            axes or "one device",
            str(plan["accumulation"]),
            plan["remat"],
            f"{plan['memory_per_device']['total'] / GIB:.2f}",
            f"{estimate['tokens_per_second_at_most']:,.0f}",
            f"{estimate['mfu_at_most']:.1%}",
            estimate["limit"],
            *(f"{1e3 * seconds:,.1f}" for seconds in times),
        )
    return table


def _say(line: str) -> None:
    print(f"mor: {line}", file=sys.stderr)

"""What a plan tells: one JSON object, or a table of the same figures."""

import dataclasses
import shlex
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.mesh.devices import GIB
from mor_jax.model.optimizer_costs import optimizer_costs
from mor_jax.plan.attainable import attainable_seconds
from mor_jax.plan.clock import Clock
from mor_jax.plan.clock_report import clock_report, clock_tables, with_attainable
from mor_jax.plan.collectives import Collective, bytes_by_kind, collectives
from mor_jax.plan.compile import CompiledStep
from mor_jax.plan.hlo_flops import MatrixFlops, matrix_flops
from mor_jax.plan.roofline import roofline, step_flops
from mor_jax.plan.topology import Topology
from mor_jax.train.step import OPTIMIZER_SCOPE
from mor_jax.versions import installed_versions

WIDTH = 110
"""Columns that the tables need."""
_DAY = 86400
_PACKAGES = ("mor-jax", "jax", "jaxlib", "libtpu", "flax")


def report(step: CompiledStep, command: list[str]) -> dict[str, Any]:
    """Collect the figures of a compiled step as JSON values; bytes and seconds unless the name says otherwise.

    Args:
        step: from ``compile_step``.
        command: what was typed, to be repeated.
    """
    config, topology = step.config, step.topology
    sizes = {str(axis): size for axis, size in step.mesh.shape.items()}
    found = collectives(step.module, step.mesh.size, topology.slices)
    traffic = bytes_by_kind(found)
    received = (sum(kind["bytes"] for kind in traffic.values()), sum(kind["bytes_across"] for kind in traffic.values()))
    fused = step.attention != "xla"
    bound = roofline(config, sizes, topology.generation, received, fused_attention=fused)
    compiled = matrix_flops(step.module)
    plan = {
        "command": shlex.join(command),
        "preset": config.preset,
        "topology": {"name": topology.name, "slices": topology.slices, "chips": topology.chips},
        "mesh": sizes,
        "execution": config.perf.execution,
        "remat": config.perf.remat,
        "attention": step.attention,
        "rows_per_step": config.train.batch_size,
        "accumulation": config.train.accumulation,
        "tokens_per_step": config.train.batch_size * config.model.context_length,
        "memory_per_device": {**dataclasses.asdict(step.memory), "total": step.memory.total},
        "flops": {
            **dataclasses.asdict(step_flops(config, fused_attention=fused)),
            "compiled_per_device": compiled.total,
            "kernel_calls": compiled.opaque_calls.get("tpu_custom_call", 0),
        },
        "optimizer": _optimizer(step, sizes, found, compiled),
        "collectives_per_device": traffic,
        "loops_of_unknown_length": len(step.module.unknown_loops),
        "estimate": {
            "seconds": {
                "arithmetic": bound.arithmetic,
                "memory": bound.memory,
                "network": bound.network,
                "network_across": bound.network_across,
            },
            "limit": bound.limit,
            "tokens_per_second_at_most": bound.tokens_per_second,
            "mfu_at_most": bound.mfu,
        },
        "compile_seconds": step.seconds,
        "versions": versions(),
        "config": config_io.to_dict(config),
    }
    return plan if step.clock is None else {**plan, "clock": step_clock(step.clock, config, sizes, topology)}


def step_clock(clock: Clock, config: Config, sizes: dict[str, int], topology: Topology) -> dict[str, Any]:
    """Put the clock of a step beside what is attainable, as JSON values.

    Args:
        clock: of the step.
        config: of the run.
        sizes: devices per mesh axis.
        topology: that the step is compiled for.
    """
    generation = topology.generation
    flops = step_flops(config).model / len(topology.devices)
    parts = attainable_seconds(config, sizes, generation)
    return with_attainable(clock_report(clock, generation), parts, flops, generation.chip.flops)


def _optimizer(
    step: CompiledStep, sizes: dict[str, int], found: list[Collective], compiled: MatrixFlops
) -> dict[str, Any]:
    """What the optimiser takes: FLOPs of the whole step, the rest of one device; its state is in the memory's table."""
    config = step.config
    whole, here = optimizer_costs(config), optimizer_costs(config, sizes)
    mine = [item for item in found if OPTIMIZER_SCOPE in item.op_name]
    return {
        "kind": config.optimizer.kind,
        "flops": whole.flops,
        "share_of_model_flops": whole.flops / step_flops(config).model,
        "flops_per_device": here.flops,
        "compiled_flops_per_device": sum(n for name, n in compiled.by_op_name.items() if OPTIMIZER_SCOPE in name),
        "bytes_per_device": here.traffic,
        "received_per_device": sum(item.total_bytes for item in mine),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a plan depends on."""
    return installed_versions(_PACKAGES)


def print_report(plan: dict[str, Any]) -> None:
    """Print a plan as tables."""
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    console.print(
        Group(
            Text(_headline(plan)),
            memory_table("memory of one device", plan["memory_per_device"], _MEMORY),
            _traffic_table(plan),
            _estimate_table(plan),
            *([_run_table(plan["run"])] if "run" in plan else []),
            *([clock_tables(plan["clock"])] if "clock" in plan else []),
        )
    )


def _headline(plan: dict[str, Any]) -> str:
    topology, mesh = plan["topology"], plan["mesh"]
    slices = "" if topology["slices"] == 1 else f"{topology['slices']} x "
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    flops = plan["flops"]
    grows = "the step of the last stage of train.growth; memory: of the largest\n" if _grows(plan) else ""
    return (
        f"{plan['preset']} on {slices}{topology['name']} ({topology['chips']} chips): {axes}\n{grows}"
        f"{plan['rows_per_step']} rows = {plan['tokens_per_step']:,} tokens per step in {plan['accumulation']} "
        f"micro-batches, execution {plan['execution']}, remat {plan['remat']}, attention {plan['attention']}\n"
        f"{flops['model']:.4g} FLOPs per step, {flops['per_token']:.4g} per token, {flops['executed']:.4g} executed "
        f"per step; compiled in {plan['compile_seconds']:.0f} s\n"
        f"{_optimizer_line(plan['optimizer'])}\n"
    )


def _optimizer_line(optimizer: dict[str, Any]) -> str:
    products = "no matrix products"
    if optimizer["flops"]:
        share, here = optimizer["share_of_model_flops"], optimizer["flops_per_device"]
        products = f"{optimizer['flops']:.4g} FLOPs ({share:.2%} of the model's), {here:.4g} on one device"
    moved, received = optimizer["bytes_per_device"] / GIB, optimizer["received_per_device"] / 1e6
    return (
        f"optimiser {optimizer['kind']}, per step: {products}; one device moves {moved:.3f} GiB of its memory and "
        f"receives {received:,.1f} MB"
    )


def _grows(plan: dict[str, Any]) -> bool:
    return len(plan.get("run", {}).get("stages", ())) > 1


_MEMORY = {
    "parameters": "parameters",
    "optimiser": "optimiser",
    "batch": "batch and padding",
    "activations": "activations, gradients, workspace",
    "code": "code",
}


def memory_table(title: str, memory: dict[str, int], names: dict[str, str]) -> Table:
    """Lay out the memory of one device by kind, and the total beside the limit.

    Args:
        title: of the table.
        memory: bytes by kind, ``total`` and ``limit``.
        names: the kinds in order, and what they are called.
    """
    table = Table(title, box=None, pad_edge=False)
    table.add_column("GiB", justify="right")
    for key, name in names.items():
        table.add_row(name, f"{memory[key] / GIB:.3f}")
    share = memory["total"] / memory["limit"]
    table.add_row("total", f"{memory['total'] / GIB:.3f}", f"{share:.0%} of {memory['limit'] / GIB:.2f}")
    return table


def _traffic_table(plan: dict[str, Any]) -> Table:
    table = Table("\nreceived by one device per step", box=None, pad_edge=False)
    for column in ("\ncount", "\nMB on the slice", "\nMB across slices"):
        table.add_column(column, justify="right")
    for kind, traffic in plan["collectives_per_device"].items():
        on_slice, across = (f"{traffic[key] / 1e6:,.1f}" for key in ("bytes", "bytes_across"))
        table.add_row(kind, f"{traffic['count']:,}", on_slice, across)
    if plan["loops_of_unknown_length"]:
        table.add_row(f"({plan['loops_of_unknown_length']} loops of unknown length counted once)")
    return table


def _run_table(run: dict[str, Any]) -> Table:
    """Lay out what the stages of a run take, and all of them together."""
    table = Table("\nthe whole run", box=None, pad_edge=False)
    for column in ("\nsteps", "\nFLOPs", "days at least", "GiB per device"):
        table.add_column(column, justify="right")
    for stage in run["stages"]:
        days = stage["steps"] * stage["seconds_per_step_at_least"] / _DAY
        cells = (f"{stage['steps']:,}", f"{stage['flops']:.3g}", f"{days:.3f}", f"{stage['memory'] / GIB:.3f}")
        table.add_row(stage["description"], *cells)
    if len(run["stages"]) > 1:
        steps = sum(stage["steps"] for stage in run["stages"])
        table.add_row("together", f"{steps:,}", f"{run['flops']:.3g}", f"{run['seconds_at_least'] / _DAY:.3f}", "")
    return table


def _estimate_table(plan: dict[str, Any]) -> Table:
    estimate = plan["estimate"]
    table = Table("\nestimate, nothing measured: seconds per step at peak rates", box=None, pad_edge=False)
    table.add_column("\n", justify="right")
    for name, seconds in estimate["seconds"].items():
        table.add_row(name.replace("_", " "), f"{seconds:.4f}")
    bound = f"{estimate['tokens_per_second_at_most']:,.0f} tokens/s, MFU {estimate['mfu_at_most']:.1%}"
    table.add_row(f"at most, by {estimate['limit']}, if all overlap", bound)
    return table

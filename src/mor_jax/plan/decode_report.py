"""What a plan of decoding tells, and how many tokens a chip decodes at most: bytes and arithmetic at peak rates.

The bound is an estimate: every slot is full, routers let the training capacities pass, sequences hold a given number
of tokens, prompts cost nothing, and only weights and visible keys and values are read. Nothing here was measured.
Letters: R recursions, T tokens that a sequence holds, C block slots, E exit slots.
"""

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mor_jax.config import ModelConfig
from mor_jax.config import io as config_io
from mor_jax.infer.cache import entry_bytes, kv_layout
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_shape import EngineShape
from mor_jax.plan.clock_report import clock_report, clock_tables
from mor_jax.plan.decode import CompiledDecode, Program, tokens_held, tree_bytes
from mor_jax.plan.report import WIDTH, memory_table, versions
from mor_jax.plan.topology import Generation


@dataclass(frozen=True)
class DecodeBound:
    """Tokens per second of one chip at peak rates, and what they are made of."""

    block_weights: int
    """Bytes of the shared block that a block step reads."""
    exit_weights: int
    """Bytes of first and last layer and head that an exit step reads."""
    block_entries: float
    """Bytes of keys and values that a block step attends to."""
    exit_entries: float
    """Bytes that an exit step attends to."""
    tokens_per_block_step: float
    exit_steps_per_block_step: float
    memory: float
    """Seconds per token to read the bytes."""
    arithmetic: float
    """Seconds per token of the matrix products."""

    @property
    def limit(self) -> str:
        """Which of the two is longer."""
        return "memory" if self.memory >= self.arithmetic else "arithmetic"

    @property
    def tokens_per_second(self) -> float:
        """Bound of one chip."""
        return 1 / max(self.memory, self.arithmetic)


def pass_shares(model: ModelConfig) -> tuple[float, ...]:
    """Share of the tokens that each pass over the block computes: the training capacities, or all."""
    layout = kv_layout(model)
    if layout.passes == 1 or model.routing.kind == "none":
        return (1.0,) * layout.passes
    shares = model.capacities
    return (1.0, *shares[1:]) if model.recursion.kv_strategy == "shared" else tuple(shares)


def decode_bound(weights: DecodeModel, shape: EngineShape, generation: Generation, tokens: int) -> DecodeBound:
    """Divide bytes and FLOPs by peak rates.

    Args:
        weights: (abstract) model.
        shape: of the engine.
        generation: rates of a chip.
        tokens: T, those that each sequence holds.
    """
    model, layout, shares = weights.config, kv_layout(weights.config), pass_shares(weights.config)
    repeats = model.recursion.num_recursions if model.recursion.is_sequence else 1
    entry = entry_bytes(model, shape.kv_dtype)
    head = tree_bytes(weights.embedding_VD if weights.head_VD is None else weights.head_VD)
    block, edges = tree_bytes(weights.block), tree_bytes((weights.first, weights.last))
    own = model.recursion.kv_strategy == "recursion"  # a recursion's cache holds the tokens that reached it
    seen = sum(share * tokens * (share if own else 1.0) for share in shares) / sum(shares)
    per_step = min(shape.block_slots, shape.max_running) / sum(shares)
    per_step = min(per_step, shape.exit_slots)  # at most one exit step follows a block step
    exits = per_step / shape.exit_slots
    read = {
        "block_weights": block * repeats,
        "exit_weights": edges + head,
        "block_entries": per_step * sum(shares) * seen * entry * model.block_depth * repeats,
        "exit_entries": shape.exit_slots * tokens * entry * layout.edge_layers,
    }
    of_block, of_exit = (read[f"{s}_weights"] + read[f"{s}_entries"] for s in ("block", "exit"))
    width = jnp.dtype(model.dtype).itemsize
    scores = (
        4
        * model.num_heads
        * model.head_dim
        * (sum(shares) * seen * model.block_depth * repeats + tokens * layout.edge_layers)
    )
    flops = 2 * (block * repeats * sum(shares) + edges + head) / width + scores
    return DecodeBound(
        **read,
        tokens_per_block_step=per_step,
        exit_steps_per_block_step=exits,
        memory=(of_block + exits * of_exit) / per_step / generation.chip.hbm_rate,
        arithmetic=flops / generation.chip.flops,
    )


def decode_report(step: CompiledDecode, command: list[str]) -> dict[str, Any]:
    """Collect the figures as JSON values; bytes and seconds unless the name says otherwise.

    Args:
        step: from ``compile_decode``.
        command: what was typed, to be repeated.
    """
    topology, shape, memory = step.topology, step.shape, step.memory
    half = tokens_held(shape)
    bound = decode_bound(step.model, shape, topology.generation, half)
    programs = {"dispatch": step.dispatch, "prefill": step.prefill}
    clocks = {
        name: clock_report(program.clock, topology.generation)
        for name, program in programs.items()
        if program.clock is not None
    }
    if clocks:
        clocks["dispatch"] |= _beside_the_bytes(clocks["dispatch"], bound, shape, topology.generation)
    return {
        "command": shlex.join(command),
        "preset": step.config.preset,
        "topology": {"name": topology.name, "slices": topology.slices, "chips": topology.chips},
        "sharding": "none: the engine runs on one chip, and these figures are of one chip",
        "engine": dataclasses.asdict(shape),
        "memory_per_device": {**dataclasses.asdict(memory), "total": memory.total},
        "programs": {name: _program(program) for name, program in programs.items()},
        "estimate": {
            "tokens_held_per_sequence": half,
            "shares_reaching_each_pass": pass_shares(step.config.model),
            "bytes_read": {
                name: getattr(bound, name)
                for name in ("block_weights", "exit_weights", "block_entries", "exit_entries")
            },
            "tokens_per_block_step": bound.tokens_per_block_step,
            "exit_steps_per_block_step": bound.exit_steps_per_block_step,
            "seconds_per_token": {"memory": bound.memory, "arithmetic": bound.arithmetic},
            "limit": bound.limit,
            "tokens_per_second_at_most": bound.tokens_per_second,
        },
        **({"clock": clocks} if clocks else {}),
        "versions": versions(),
        "config": config_io.to_dict(step.config),
    }


def _beside_the_bytes(
    clock: dict[str, Any], bound: DecodeBound, shape: EngineShape, generation: Generation
) -> dict[str, Any]:
    """What a dispatch takes to read weights, keys and values alone, every step with an exit step, as in the clock."""
    read = bound.block_weights + bound.block_entries + bound.exit_weights + bound.exit_entries
    return {
        "steps": shape.steps,
        "bytes_seconds": shape.steps * read / generation.chip.hbm_rate,
        "tokens_per_second": shape.steps * bound.tokens_per_block_step / clock["seconds"],
    }


def _program(program: Program) -> dict[str, Any]:
    names = ("activations", "arguments", "code", "seconds")
    return {name: getattr(program, name) for name in names}


def print_decode_report(plan: dict[str, Any]) -> None:
    """Print a plan of decoding as tables."""
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    console.print(
        Group(
            Text(_headline(plan)),
            memory_table("memory of one chip", plan["memory_per_device"], _MEMORY),
            _estimate_table(plan),
            *(
                clock_tables(clock, f"{name}, by the compiler's clock, nothing measured")
                for name, clock in plan.get("clock", {}).items()
            ),
        )
    )


def _headline(plan: dict[str, Any]) -> str:
    engine, topology = plan["engine"], plan["topology"]
    slices = "" if topology["slices"] == 1 else f"{topology['slices']} x "
    seconds = sum(program["seconds"] for program in plan["programs"].values())
    return (
        f"{plan['preset']} decoding on one chip of {slices}{topology['name']}; the engine is not sharded, each of the "
        f"{topology['chips']} chips can run its own\n"
        f"{engine['max_running']} sequences of at most {engine['max_length']} tokens ({engine['places']} hold pages), "
        f"{engine['block_slots']} block slots, {engine['exit_slots']} exit slots\n"
        f"attention {engine['backend']}; a dispatch and a prompt chunk compiled in {seconds:.0f} s\n"
    )


_MEMORY = {
    "parameters": "parameters",
    "kv_pages": "pages of keys and values",
    "state": "tables, requests",
    "padding": "padding to the chip's tiles",
    "activations": "activations, workspace",
    "code": "code of both programs",
}


def _estimate_table(plan: dict[str, Any]) -> Table:
    estimate = plan["estimate"]
    read = estimate["bytes_read"]
    title = f"\nestimate, nothing measured: {estimate['tokens_held_per_sequence']} tokens held, all slots full"
    table = Table(title, box=None, pad_edge=False)
    table.add_column("\n", justify="right")
    for stage in ("block", "exit"):
        weights, entries = read[f"{stage}_weights"] / 1e6, read[f"{stage}_entries"] / 1e6
        table.add_row(f"MB read per {stage} step", f"{weights:,.1f} weights, {entries:,.1f} keys and values")
    steps = f"{estimate['tokens_per_block_step']:.1f} (and {estimate['exit_steps_per_block_step']:.2f} exit steps)"
    table.add_row("tokens per block step", steps)
    for name, seconds in estimate["seconds_per_token"].items():
        table.add_row(f"microseconds per token, {name}", f"{1e6 * seconds:.2f}")
    bound = f"{estimate['tokens_per_second_at_most']:,.0f} tokens/s of one chip"
    table.add_row(f"at most, by {estimate['limit']}, if prompts cost nothing", bound)
    return table

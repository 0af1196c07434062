"""``mor presets [FILTER] [--json]``: what there is and what it reproduces."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from mor_jax import presets
from mor_jax.cli.options import parse
from mor_jax.errors import require, suggest
from mor_jax.model.flops import count_parameters, paper_flops_per_token, run_flops

_WIDTH = 160


@dataclass(frozen=True)
class PresetsArguments:
    """Arguments of ``mor presets``."""

    filter: Annotated[str, tyro.conf.Positional] = ""
    """Only names that contain this, such as `360m` or `expert-r3`."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class PresetRow:
    """One line of the table."""

    name: str
    parameters: int
    non_embedding: int
    forward_flops_per_token: float
    """By the paper's count."""
    train_flops_per_token: float
    """Exact: head and backward pass included; the mean over the stages of a run that grows."""
    tokens: int
    reproduces: str


def rows(contains: str) -> list[PresetRow]:
    """Measure every preset whose name contains a text."""
    table = []
    for name in presets.names():
        if contains not in name:
            continue
        preset = presets.get(name)
        model, train = preset.config.model, preset.config.train
        count, tokens = count_parameters(model), train.steps * train.batch_size * model.context_length
        table.append(
            PresetRow(
                name=name,
                parameters=count.total,
                non_embedding=count.non_embedding,
                forward_flops_per_token=paper_flops_per_token(model),
                train_flops_per_token=run_flops(preset.config) / tokens,
                tokens=tokens,
                reproduces=preset.reproduces,
            )
        )
    return table


def run(arguments: Sequence[str]) -> int:
    """Print the table."""
    options = parse(PresetsArguments, arguments, "presets", "List the named configurations.")
    found = rows(options.filter)
    require(bool(found), f"no preset's name contains {options.filter!r}{suggest(options.filter, presets.names())}")
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return 0
    _print_table(found)
    return 0


def _print_table(found: Sequence[PresetRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("preset", box=None, pad_edge=False)
    for column in ("parameters", "without embedding", "forward FLOPs/token", "training FLOPs/token", "tokens"):
        table.add_column(column, justify="right")
    table.add_column("reproduces")
    for row in found:
        counts = (_short(row.parameters), _short(row.non_embedding))
        flops = (_short(row.forward_flops_per_token), _short(row.train_flops_per_token))
        table.add_row(row.name, *counts, *flops, _short(row.tokens), row.reproduces)
    console = Console()
    if console.width < _WIDTH:  # cut names would be useless: let the terminal wrap the lines
        console = Console(width=_WIDTH)
    console.print(table)
    print("forward: the paper's count, without head; training: exact, with head and backward pass")


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"

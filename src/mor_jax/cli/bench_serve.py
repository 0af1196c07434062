"""``mor bench serve MODEL...``: throughput of the engine, models compared within one run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.cli.options import parse, refuse_products
from mor_jax.errors import require


@dataclass(frozen=True)
class BenchServeArguments:
    """Arguments of ``mor bench serve``."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PRESET[@LAYERS], such as vanilla-360m@34; the first is what the others are compared with."""
    settings: Annotated[ServeSettings, tyro.conf.arg(name="")] = field(default_factory=ServeSettings)
    out: Path | None = None
    """JSON file for the results."""


def run(arguments: Sequence[str]) -> int:
    """Measure and print a line per model."""
    refuse_products(arguments, "--products")
    options = parse(BenchServeArguments, arguments, "bench serve", "Measure the engine's throughput.")
    require(bool(options.models), "mor bench serve needs at least one model, such as vanilla-360m")
    from mor_jax.bench.serving import bench_serve

    def save(record: dict[str, Any]) -> None:
        print(line(record["results"][-1]), file=sys.stderr)
        if options.out is not None:
            command = ["mor", "bench", "serve", *arguments]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"command": command, **record}, indent=1) + "\n", encoding="utf-8")

    record = bench_serve(options.models, options.settings, done=save)
    print(
        json.dumps(
            [{k: m[k] for k in ("model", "match", "batch", "tokens_per_second", "ratio")} for m in record["results"]],
            indent=1,
        )
    )
    return 0


def line(result: dict[str, Any]) -> str:
    """Say one model's result in one line."""
    shape = result["options"]
    name = f"{result['model']} ({result['match']} {result['batch']})"
    speed = f"{result['tokens_per_second']:,.0f} tokens/s ({result['ratio']:.2f}x)"
    slots = f"{result['copies'] * shape['block_slots']} block slots {result['block_slot_use']:.0%} used"
    bound = f"{result['fraction_of_bytes_bound']:.0%} of the bytes bound"
    return f"{name}: {speed}, {result['in_flight']} in flight, {slots}, {bound}; {result.get('router', 'no router')}"

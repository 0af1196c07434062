"""``mor bench train CASE...``: speed of the train step on the present device, cases compared within one run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mor_jax.bench.cases import parse_case
from mor_jax.bench.run import Settings, clock_table, profile_table, run_cases, table
from mor_jax.cli.options import parse
from mor_jax.errors import UserError


@dataclass(frozen=True)
class BenchTrainArguments:
    """Arguments of ``mor bench train``."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PRESET[:field=value,...]; the first is what the others are compared with. `remat=full` is perf.remat=full."""
    set: tuple[str, ...] = ()
    """field=value for every case, such as model.context_length=4096."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    out: Path | None = None
    """JSON file for the results."""


def run(arguments: Sequence[str]) -> int:
    """Time every case and print the table."""
    options = parse(BenchTrainArguments, arguments, "bench train", "Time the train step, one process per case.")
    if not options.cases:
        raise UserError("mor bench train needs at least one case, such as vanilla-360m")
    cases = [parse_case(text, options.set) for text in options.cases]

    def save(record: dict[str, Any]) -> None:
        result = record["cases"][-1]
        print(f"{result['name']}: {result.get('error') or _line(result)}", file=sys.stderr)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    command = ["mor", "bench", "train", *arguments]
    record = run_cases(cases, options.settings, command=command, done=save)
    print(table(record))
    if options.settings.profile is not None:
        print(profile_table(record))
        for case in record["cases"]:
            if beside := case.get("profile", {}).get("beside_clock"):
                print(clock_table(case["name"], beside))
    return 1 if any("error" in case for case in record["cases"]) else 0


def _line(result: dict[str, Any]) -> str:
    return f"{result['step_seconds'] * 1e3:.1f} ms, {result['tokens_per_second']:,.0f} tokens/s"

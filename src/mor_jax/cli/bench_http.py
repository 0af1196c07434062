"""``mor bench http URL``: load on an OpenAI-compatible server, this project's or another's."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mor_jax.bench.http_settings import HttpSettings
from mor_jax.cli.options import parse


@dataclass(frozen=True)
class BenchHttpArguments:
    """Arguments of ``mor bench http``."""

    url: Annotated[str, tyro.conf.Positional]
    """Of the server, such as http://127.0.0.1:8000. A key is taken from OPENAI_API_KEY."""
    model: str | None = None
    """Its name at the server; None is the only one that it has."""
    settings: Annotated[HttpSettings, tyro.conf.arg(name="")] = field(default_factory=HttpSettings)
    out: Path | None = None
    """JSON file for the results."""


def run(arguments: Sequence[str]) -> int:
    """Measure, and print every measurement when it is over."""
    options = parse(BenchHttpArguments, arguments, "bench http", "Measure a server of OpenAI's form over HTTP.")
    from mor_jax.bench.http_load import bench_http
    from mor_jax.bench.http_report import measurement_text

    def save(record: dict[str, Any]) -> None:
        print(measurement_text(record["measurements"][-1]), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    command, key = ["mor", "bench", "http", *arguments], os.environ.get("OPENAI_API_KEY", "")
    record = bench_http(options.url, options.settings, model=options.model, key=key, command=command, done=save)
    return 0 if all(result["completed"] for result in record["measurements"]) else 1

"""Is the decode attention kernel (``mor_jax.kernels.decode_attention``) worth its lines? Tokens/s with it and without.

Usage: python experiments/serving/decode_attention.py --out FILE. The other engine gathers the pages and attends by XLA.
Engines are compiled first, side by side, then timed in turn on the same requests, in one process on one device.
"""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import tyro

from mor_jax.bench.serving import run_requests
from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.bench.serving_setup import Scenario, make_requests, options_for, parse_model, random_model
from mor_jax.infer.engine_options import DecodeBackend
from mor_jax.infer.replicas import AnyEngine, make_engine


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """JSON file."""
    models: tuple[str, ...] = ("vanilla-360m", "mor-360m-expert-r3")
    batches: tuple[int, ...] = (8, 32)
    """Sequences in flight."""
    requests: int = 4
    """Requests per sequence in flight."""
    rounds: int = 3
    """Runs of each engine, in turn."""
    backends: tuple[DecodeBackend, ...] = ("pallas", "xla")


def main(settings: Settings) -> None:
    """Time every pair and write the table."""
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.local_devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "results": [],
    }
    for name in settings.models:
        config = parse_model(name)
        models, _ = random_model(config, ServeSettings())

        def build(case: tuple[int, DecodeBackend], models: Any = models) -> AnyEngine:
            batch, backend = case
            options = options_for(models[0], ServeSettings(), Scenario("memory", batch, None))
            engine = make_engine(models, dataclasses.replace(options, backend=backend))
            engine.warm_up(prompts=False)
            return engine

        cases = [(batch, backend) for batch in settings.batches for backend in settings.backends]
        with ThreadPoolExecutor(len(cases)) as pool:
            engines = dict(zip(cases, pool.map(build, cases), strict=True))
        for batch in settings.batches:
            requests = make_requests(config, ServeSettings(requests=settings.requests * batch))
            speeds: dict[str, list[float]] = {backend: [] for backend in settings.backends}
            for _ in range(settings.rounds):
                for backend in settings.backends:
                    engine = engines[batch, backend]
                    engine.reset_statistics()
                    speeds[backend].append(run_requests(engine, requests)["tokens_per_second"])
            first, last = (median(speeds[backend]) for backend in (settings.backends[0], settings.backends[-1]))
            row = {"model": name, "batch": batch, "tokens_per_second": speeds, "ratio": first / last}
            record["results"].append(row)
            print(json.dumps(row), flush=True)
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))

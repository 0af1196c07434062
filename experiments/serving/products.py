"""Do this project's kernels for matrix products beat XLA's at sizes that a user serves?

Usage: python experiments/serving/products.py --out FILE. Engines of both kinds are compiled first, then timed in turn
(A/B/A/B), on the same requests, in one process on one card.
"""

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from mor_jax.bench.serving import _run
from mor_jax.bench.serving_setup import Scenario, ServeSettings, make_requests, options_for, parse_model, random_model
from mor_jax.infer.replicas import make_engine


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """JSON file."""
    models: tuple[str, ...] = ("vanilla-360m", "mor-360m-expert-r3")
    batches: tuple[int, ...] = (1, 2, 4, 8, 32)
    """Sequences in flight."""
    requests: int = 4
    """Requests per sequence in flight."""
    rounds: int = 3
    """Runs of each engine, in turn."""
    products: tuple[str, ...] = ("pallas", "xla")


def main(settings: Settings) -> None:
    """Time every pair and write the table."""
    device = jax.local_devices()[0]
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "settings": dataclasses.asdict(settings) | {"out": settings.out.name},
        "results": [],
    }
    for name in settings.models:
        config = parse_model(name)
        models, _ = random_model(config, ServeSettings())

        def build(case: tuple[int, str], models: Any = models) -> Any:
            batch, products = case
            own = ServeSettings(requests=settings.requests * batch, products=products)  # type: ignore[arg-type]
            engine = make_engine(models, options_for(models[0], own, Scenario("memory", batch, None)))
            engine.warm_up(prompts=False)
            return engine, own

        cases = [(batch, products) for batch in settings.batches for products in settings.products]
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(cases)) as pool:
            engines = dict(zip(cases, pool.map(build, cases), strict=True))
        print(f"{name}: compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        for batch in settings.batches:
            speeds: dict[str, list[float]] = {products: [] for products in settings.products}
            for _ in range(settings.rounds):
                for products in settings.products:
                    engine, own = engines[batch, products]
                    engine.reset_statistics()
                    speeds[products].append(_run(engine, make_requests(config, own))["tokens_per_second"])
            medians = {products: float(np.median(found)) for products, found in speeds.items()}
            ratio = medians[settings.products[0]] / medians[settings.products[-1]]
            row = {"model": name, "batch": batch, "tokens_per_second": speeds, "median": medians, "ratio": ratio}
            record["results"].append(row)
            print(json.dumps(row), flush=True)
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))

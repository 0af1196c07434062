"""What does Muon cost in a train step? The step with AdamW and with Muon on this device, compiled first, timed in turn.

    python experiments/throughput/optimizers.py --out FILE.json
    python experiments/throughput/optimizers.py --cases vanilla-360m mor-360m-expert-r3 --steps 20 --rounds 4 --out FILE.json
    python experiments/throughput/optimizers.py --cases debug --rows 2 --steps 2 --rounds 2 --out FILE.json

Programs are timed round after round, so that both see the same clock; the ratio is of medians. The first has about 100
seconds of one H200, compilation included: one layer a loop, which compiles in a fraction of the time of `auto`.
"""  # noqa: E501

import dataclasses
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import tyro

from mor_jax.bench.cases import parse_case
from mor_jax.bench.measure import random_batch, time_steps
from mor_jax.bench.run import Settings as BenchSettings
from mor_jax.bench.run import measured_config
from mor_jax.config import Config, OptimizerKind
from mor_jax.config.io import to_dict
from mor_jax.errors import UserError, require
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.model.flops import train_flops_per_token
from mor_jax.model.optimizer_costs import optimizer_costs
from mor_jax.perf import resolve_perf
from mor_jax.plan.report import versions
from mor_jax.runs.state import init_train_state
from mor_jax.train.step import compile_train_step

_BATCHES = 4


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often."""

    out: Path
    """JSON file for the results; written anew after every round."""
    cases: tuple[str, ...] = ("mor-360m-expert-r3:scan_unroll=1",)
    """Presets and overrides, as ``mor bench train`` takes them."""
    rows: int = 16
    """Rows of a step."""
    steps: int = 10
    """Timed steps of a program in a round."""
    warmup: int = 2
    """Steps before them."""
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("rows", "steps", "rounds"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative")


def measure(settings: Settings) -> dict[str, Any]:
    """Time every case with both optimisers, and write the file.

    Raises:
        UserError: a case is refused.
    """
    record: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "cases": [],
    }
    configs = [
        (text, measured_config(parse_case(text).config, BenchSettings(rows=settings.rows))) for text in settings.cases
    ]
    for text, config in configs:
        record["cases"].append({"name": text})
        _measure_case(record["cases"][-1], config, settings, record)
    return record


def _measure_case(case: dict[str, Any], config: Config, settings: Settings, record: dict[str, Any]) -> None:
    """Fill in one case, a state and a program per optimiser; both states are in memory at the same time."""
    device = jax.devices()[0]
    mesh = make_mesh(config.mesh, [device])
    batches = [
        shard_batch(mesh, random_batch(config.model, settings.rows, packed=False, seed=s)) for s in range(_BATCHES)
    ]
    kinds: tuple[OptimizerKind, ...] = get_args(OptimizerKind)
    programs, states, times = {}, {}, {kind: [] for kind in kinds}
    for kind in kinds:
        variant = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind=kind))
        variant = dataclasses.replace(variant, perf=resolve_perf(variant, mesh).asked)
        begin = time.perf_counter()
        programs[kind] = compile_train_step(variant, mesh)
        seconds = time.perf_counter() - begin
        states[kind] = init_train_state(variant, mesh)
        flops = train_flops_per_token(variant.model) * settings.rows * variant.model.context_length
        case[kind] = {
            "config": to_dict(variant),
            "compile_seconds": seconds,
            "model_flops": flops,
            "optimizer_flops": optimizer_costs(variant).flops,
        }
        print(f"{case['name']} {kind}: compiled in {seconds:.1f} s", file=sys.stderr, flush=True)
    for _ in range(settings.rounds):
        for kind in kinds:
            seconds, states[kind], metrics = time_steps(
                programs[kind], states[kind], batches, warmup=settings.warmup, steps=settings.steps
            )
            times[kind].append(seconds)
            case[kind] |= _figures(times[kind]) | {"last_loss": float(metrics["loss"])}
        case["muon_over_adamw"] = case["muon"]["milliseconds"] / case["adamw"]["milliseconds"]
        settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    del programs, states
    gc.collect()  # the next case needs the memory


def _figures(rounds: list[list[float]]) -> dict[str, Any]:
    return {
        "milliseconds": 1e3 * statistics.median(second for seconds in rounds for second in seconds),
        "milliseconds_by_round": [1e3 * statistics.median(seconds) for seconds in rounds],
    }


def main() -> int:
    """Run and print; 2 where there is nothing to measure."""
    settings = tyro.cli(Settings, description=__doc__)
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        record = measure(settings)
    except (UserError, OSError) as error:
        print(f"optimizers: {error}", file=sys.stderr)
        return 2
    for case in record["cases"]:
        adamw, muon = case["adamw"], case["muon"]
        print(
            f"{case['name']}: AdamW {adamw['milliseconds']:.2f} ms, Muon {muon['milliseconds']:.2f} ms, ratio "
            f"{case['muon_over_adamw']:.3f}; Muon's products are {muon['optimizer_flops'] / muon['model_flops']:.1%} "
            "of the model's FLOPs"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

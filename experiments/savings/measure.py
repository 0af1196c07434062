"""FLOPs and step time of vanilla, recursive and MoR models: compiled program, exact count, the paper's count, clock.

python experiments/savings/measure.py                   # small models, compiled and timed
python experiments/savings/measure.py --size 360m       # the paper's size, compiled only
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax import presets
from mor_jax.config import Config, ModelConfig, PerfConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.model.flops import count_parameters, paper_flops_per_token, train_flops
from mor_jax.plan.hlo import parse
from mor_jax.plan.hlo_flops import matrix_flops
from mor_jax.runs.state import init_train_state
from mor_jax.train.step import compile_train_step

RESULTS = Path(__file__).parent / "results"
VANILLA = "vanilla"


def small_models() -> dict[str, ModelConfig]:
    """Eight layers of width 256 over rows of 256 tokens, all unrolled to the same depth."""
    vanilla = ModelConfig(
        vocab_size=2048, num_layers=8, d_model=256, num_heads=4, num_kv_heads=2, d_ff=640, context_length=256,
        dtype="float32",
    )  # fmt: skip
    recursion = RecursionConfig(3, "middle_cycle")
    shared = dataclasses.replace(recursion, kv_strategy="shared")
    expert = RoutingConfig("expert")
    return {
        VANILLA: vanilla,
        "recursive r3": dataclasses.replace(vanilla, recursion=recursion),
        "MoR r3, recursion": dataclasses.replace(vanilla, recursion=recursion, routing=expert),
        "MoR r3, shared": dataclasses.replace(vanilla, recursion=shared, routing=expert),
    }


def paper_models(size: str) -> dict[str, ModelConfig]:
    """The presets of one of the paper's sizes."""
    names = {
        VANILLA: f"vanilla-{size}",
        "recursive r3": f"recursive-{size}-r3",
        "MoR r3, recursion": f"mor-{size}-expert-r3",
        "MoR r3, shared": f"mor-{size}-expert-r3-share",
    }
    return {label: presets.get(name).config.model for label, name in names.items()}


def make_config(model: ModelConfig, rows: int) -> Config:
    """A run of this model on one device: no rematerialisation, the plain attention that computes all scores."""
    perf = PerfConfig(attention_backend="xla", loss_chunk=128)
    return Config(model=model, train=TrainConfig(steps=1000, batch_size=rows), perf=perf)


def compile_step(config: Config) -> Any:
    """The train step as `mor train` runs it."""
    return compile_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))


def count(config: Config, program: Any) -> dict[str, Any]:
    """FLOPs of one token, by every count."""
    model, tokens = config.model, config.train.batch_size * config.model.context_length
    module = parse(program.as_text())
    if module.unknown_loops:
        raise RuntimeError(f"loops without a known trip count: {module.unknown_loops}")
    flops = matrix_flops(module)
    compiled = flops.total / tokens
    exact = {
        work: sum(train_flops(model, attention=work).values()) / model.context_length for work in ("full", "causal")
    }
    return {
        "parameters": count_parameters(model).total,
        "compiled_flops_per_token": compiled,
        "exact_flops_per_token": exact["full"],
        "compiled_over_exact": compiled / exact["full"],
        "exact_causal_flops_per_token": exact["causal"],
        "paper_forward_flops_per_token": paper_flops_per_token(model),
        "custom_calls": dict(flops.opaque_calls),
    }


class Stepper:
    """A train step with its state, run on one batch again and again."""

    def __init__(self, config: Config, program: Any) -> None:
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        shape = (config.train.batch_size, config.model.context_length + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        arrays = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
        self.program, self.batch = program, shard_batch(mesh, arrays)
        self.state = init_train_state(config, mesh)

    def seconds(self) -> float:
        """Wall-clock time of one step."""
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def time_interleaved(steppers: dict[str, Stepper], rounds: int) -> dict[str, list[float]]:
    """One step of each model in turn, so that a slow minute of the machine hits all alike; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(rounds + 1):
        for name, stepper in steppers.items():
            seconds = stepper.seconds()
            if turn:
                times[name].append(seconds)
    return times


def measure(models: dict[str, ModelConfig], rows: int, rounds: int) -> dict[str, Any]:
    """Compile, count and (with ``rounds``) time all models."""
    configs = {name: make_config(model, rows) for name, model in models.items()}
    programs, found = {}, {}
    for name, config in configs.items():
        print(f"compiling {name}", file=sys.stderr)
        programs[name] = compile_step(config)
        found[name] = count(config, programs[name])
    if rounds:
        steppers = {name: Stepper(configs[name], programs[name]) for name in configs}
        for name, seconds in time_interleaved(steppers, rounds).items():
            found[name] |= {"step_seconds": seconds, "median_step_seconds": statistics.median(seconds)}
    for name, values in found.items():
        base = found[VANILLA]
        keys = [k for k in values if k.endswith("flops_per_token") or k == "median_step_seconds"]
        values["over_vanilla"] = {k: values[k] / base[k] for k in keys}
        # paired within a round: less noisy than a ratio of medians
        if rounds:
            pairs = zip(values["step_seconds"], base["step_seconds"], strict=True)
            values["over_vanilla"]["paired_step_seconds"] = statistics.median(a / b for a, b in pairs)
        values["model"] = dataclasses.asdict(models[name])
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    columns = (
        "MFLOPs compiled",
        "exact",
        "comp/exact",
        "| over vanilla: compiled",
        "exact",
        "causal",
        "paper",
        "clock",
    )
    print(f"{'training, per token':20s}" + " ".join(f"{c:>12s}" for c in columns))
    for name, values in found.items():
        ratios = values["over_vanilla"]
        cells = [
            f"{values['compiled_flops_per_token'] / 1e6:.2f}",
            f"{values['exact_flops_per_token'] / 1e6:.2f}",
            f"{values['compiled_over_exact']:.4f}",
            f"{ratios['compiled_flops_per_token']:.3f}",
            f"{ratios['exact_flops_per_token']:.3f}",
            f"{ratios['exact_causal_flops_per_token']:.3f}",
            f"{ratios['paper_forward_flops_per_token']:.3f}",
            f"{ratios['paired_step_seconds']:.3f}" if "paired_step_seconds" in ratios else "-",
        ]
        print(f"{name:20s}" + " ".join(f"{cell:>{max(12, len(c))}s}" for cell, c in zip(cells, columns, strict=True)))


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "135m", "360m"), default="small")
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of the small models; 0 only counts")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/SIZE-PLATFORM.json beside this script)")
    arguments = parser.parse_args()
    is_small = arguments.size == "small"
    load = os.getloadavg()[0]
    models = small_models() if is_small else paper_models(arguments.size)
    found = measure(models, arguments.rows, arguments.rounds if is_small else 0)
    show(found)
    device = jax.devices()[0]
    report = {
        "command": " ".join(["python", "experiments/savings/measure.py", *sys.argv[1:]]),
        "device": f"{device.device_kind} ({device.platform}), {platform.machine()}, {os.cpu_count()} CPU cores",
        "load_average_before_and_after": [load, os.getloadavg()[0]],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("jax", "jaxlib", "flax")}},
        "rows_per_step": arguments.rows,
        "models": found,
    }
    out = arguments.out or RESULTS / f"{arguments.size}-{device.platform}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

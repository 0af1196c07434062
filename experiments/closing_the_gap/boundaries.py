"""The gap of every recipe whose router selects, under the running boundaries that its training kept.

Each run is stopped halfway and continued, so what is measured at its end has gone through a checkpoint.

    python experiments/closing_the_gap/boundaries.py --scale debug --steps 400 --results FILE.json
"""

import argparse
import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Config
from mor_jax.data.pipeline import make_dataset
from mor_jax.evaluate.inspect import calibrated, held_out
from mor_jax.evaluate.validation import validation_losses
from mor_jax.interop.sources import open_run
from mor_jax.runs.metrics import read_metrics
from mor_jax.sweep.isoflop import with_steps
from mor_jax.sweep.recipes import SCALES, expert
from mor_jax.sweep.results import machine, write_json
from mor_jax.train.loop import train

CALIBRATION_ROWS = 256
HELD_OUT_ROWS = 256
_PLAIN: dict[str, Any] = {"residual": "plain", "alpha": 2.0}
RECIPES: Mapping[str, dict[str, Any]] = {
    "plain-alpha-2": _PLAIN,
    "plain-alpha-1": {"residual": "plain", "alpha": 1.0},
    "plain-alpha-2-no-loss": {**_PLAIN, "sampling": "none"},
    "plain-alpha-2-loss-0.01": {**_PLAIN, "sampling_coefficient": 0.01},
    "plain-alpha-2-mlp": {**_PLAIN, "router": "mlp"},
    "plain-alpha-2-shared": {**_PLAIN, "kv": "shared"},
    "plain-alpha-2-quarter": {**_PLAIN, "capacities": (1.0, 0.25, 0.25)},
    "plain-alpha-2-steep": {**_PLAIN, "capacities": (1.0, 0.25, 0.125)},
    "plain-alpha-2-all-routed": {**_PLAIN, "capacities": (0.75, 0.5, 0.25)},
    "plain-alpha-2-warm-up": {**_PLAIN, "capacity_warmup_steps": 0.1},
    "paper": {},
    "paper-loss-0.1": {"sampling_coefficient": 0.1},
    "paper-loss-0.01": {"sampling_coefficient": 0.01},
    "paper-no-loss": {"sampling": "none"},
    "paper-mlp": {"router": "mlp"},
    "paper-tanh": {"score": "tanh"},
    "paper-shared": {"kv": "shared"},
}
"""Fields of the routing; a warm-up as a share of the steps."""


def recipe(name: str, scale: str, steps: int | None, folder: Path) -> Config:
    """Return the run of a recipe."""
    fields = dict(RECIPES[name])
    warmup_share = fields.pop("capacity_warmup_steps", 0.0)
    config = expert(scale, 3, **fields)
    config = with_steps(config, steps or config.train.steps)
    routing = dataclasses.replace(config.model.routing, capacity_warmup_steps=round(warmup_share * config.train.steps))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, routing=routing))
    rows = max(HELD_OUT_ROWS, config.train.eval_rows)
    train = dataclasses.replace(config.train, eval_rows=rows, runs=str(folder), name=name)
    return dataclasses.replace(config, train=train)


class StopsHalfway:
    """A data set that asks its process to stop when half of the batches are read."""

    def __init__(self, dataset: Any, at: int) -> None:
        self._dataset, self._at = dataset, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._dataset.step

    @step.setter
    def step(self, step: int) -> None:
        self._dataset.step = step

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        if self._dataset.step == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._dataset)


def measure(name: str, config: Config) -> dict[str, Any]:
    """Train a recipe in two halves, and compare its causal losses with the look-ahead one."""

    def halfway(data: Any, *, split: str, **rest: Any) -> Any:
        dataset = make_dataset(data, split=split, **rest)  # type: ignore[arg-type]
        return StopsHalfway(dataset, config.train.steps // 2) if split == "train" else dataset

    folder = train(config, make_dataset=halfway)
    stopped = read_metrics(folder / "metrics.jsonl")
    assert not stopped or stopped[-1]["step"] < config.train.steps
    last = read_metrics(train(config) / "metrics.jsonl")[-1]
    run = open_run(folder)
    weights = {"opened": run.weights, "calibrated": calibrated(run, CALIBRATION_ROWS).weights}
    if config.model.routing.sampling != "none":
        weights["boundary_0"] = dataclasses.replace(run.weights, boundaries_R=None)
    dataset = held_out(run)
    losses = {n: validation_losses(w, run.config.perf, dataset, config.train.eval_rows) for n, w in weights.items()}
    dataset.close()
    return {
        "recipe": name,
        "steps": config.train.steps,
        "topk_nll": last["validation_topk_nll"],
        "nll": last["validation_threshold_nll"],
        "gap": last["validation_gap"],
        **{f"gap_{n}": found["validation_gap"] for n, found in losses.items()},
        "boundaries": last["boundaries_R"],
        "calibrated_boundaries": weights["calibrated"].config.routing.boundaries,
        "topk_tokens_per_depth": last["validation_topk_tokens_per_depth"],
        "tokens_per_depth": last["validation_threshold_tokens_per_depth"],
    }


def main() -> None:
    """Measure the recipes that were asked for, and write what is done after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="debug")
    parser.add_argument("--steps", type=int, help="optimiser steps; default: the scale's")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    enable_compilation_cache()
    described = machine() | {"command": "python experiments/closing_the_gap/boundaries.py"}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes:
            found.append(measure(name, recipe(name, options.scale, options.steps, Path(folder))))
            gaps = {key: round(value, 5) for key, value in found[-1].items() if key.startswith("gap")}
            print(name, gaps, flush=True)
            write_json(options.results, {"scale": options.scale, "machine": described, "recipes": found})
            jax.clear_caches()


if __name__ == "__main__":
    main()

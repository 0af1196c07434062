"""Figures of docs/results.md, from the results of the sweeps."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ranked import HERE, run_key

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.evaluate.analysis_plots import plot_correlates
from mor_jax.evaluate.correlates import Correlate, Group
from mor_jax.sweep.isoflop_plots import plot_curves, plot_depth_curves, plot_pareto
from mor_jax.sweep.results import reaching_shares, serving_flops_per_token

DOCS = HERE.parent / "docs"
MAIN = "mor_vs_baselines"
Result = Mapping[str, Any]

_NOT_COMPARED = ("learning_rate", "early_training")
"""Searches for a cause, at other budgets than the comparisons."""


def figures(results: Mapping[str, Sequence[Result]], suffix: str = "") -> list[Path]:
    """Draw what there are runs of one scale for: quality by compute, loss over training, test-time scaling.

    Args:
        results: of one scale, by experiment.
        suffix: what the names of the figures end in.
    """
    compared = {name: rows for name, rows in results.items() if name not in _NOT_COMPARED}
    done = _unique([r for rows in compared.values() for r in rows if r["state"] == "done" and r.get("nll") is not None])
    written = []
    if done:
        costs = {"training FLOPs": "train_flops", "serving FLOPs per token": "serving_flops_per_token"}
        shown = done + [_calibrated(r) for r in done if "tokens_per_depth" in r.get("calibrated", {})]
        panels = {label: _group_points(shown, key) for label, key in costs.items()}
        written += plot_pareto(DOCS / "images" / f"pareto{suffix}", panels, "causal loss (nats/token)")
    losses = training_curves(results.get(MAIN, ()))
    if losses:
        panels = {"training loss (nats/token)": losses, "less vanilla's, before decay": training_leads(results[MAIN])}
        written += plot_curves(DOCS / "images" / f"training{suffix}", panels)
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in done:
        if "depth_curve" in result:  # the first seed of every group
            curves.setdefault(result["group"], [(p["max_depth"], p["nll"]) for p in result["depth_curve"]])
    if curves:
        written += plot_depth_curves(
            DOCS / "images" / f"test-time-scaling{suffix}", curves, "cap on the passes of a token"
        )
    return written


def _unique(results: Sequence[Result]) -> list[Result]:
    """Results without those of runs that an earlier experiment has under another name."""
    found: dict[str, Result] = {}
    for result in results:
        found.setdefault(run_key(result["config"]), result)
    return list(found.values())


def _calibrated(result: Result) -> Result:
    """The same model with calibrated boundaries: other tokens pass, so its loss and what it costs to serve differ."""
    model, found = config_io.from_dict(Config, result["config"]).model, result["calibrated"]
    serving = serving_flops_per_token(model, reaching_shares(model, found["tokens_per_depth"]))
    group = f"{result['group']}, calibrated"
    return {**result, "group": group, "nll": found["nll"], "serving_flops_per_token": serving}


def _group_points(done: Sequence[Result], cost: str) -> list[tuple[str, float, float]]:
    """(group, mean cost, mean causal loss) of every group."""
    groups: dict[str, list[Result]] = {}
    for result in done:
        groups.setdefault(result["group"], []).append(result)
    return [
        (name, statistics.fmean(r[cost] for r in rows), statistics.fmean(r["nll"] for r in rows))
        for name, rows in groups.items()
    ]


def training_curves(results: Sequence[Result]) -> dict[str, list[tuple[float, float]]]:
    """Return (tokens, training loss) by group, means over the seeds that are finished; empty without a vanilla run.

    The loss is that of one batch, by top-k in a routed model; runs of one seed see the same batches.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        if result["state"] == "done" and "curve" in result:
            runs.setdefault(result["group"], []).append(result)
    curves = {}
    for name, seeds in runs.items():
        per_step = seeds[0]["tokens"] / seeds[0]["steps"]
        by_step = zip(*(run["curve"] for run in seeds), strict=True)
        curves[name] = [(points[0][0] * per_step, statistics.fmean(loss for _, loss in points)) for points in by_step]
    return curves if "vanilla" in curves else {}


def training_leads(results: Sequence[Result]) -> dict[str, list[tuple[float, float]]]:
    """Return (tokens, training loss less that of the vanilla run of the same seed) by group, means over seeds.

    Only while the learning rate of both still stands at its peak: the vanilla run, which has the fewest steps at equal
    FLOPs, decays first.
    """
    done = [r for r in results if r["state"] == "done" and "curve" in r]
    base = {r["seed"]: r for r in done if r["group"] == "vanilla"}
    differences: dict[str, dict[float, list[float]]] = {}
    for run in done:
        if run["group"] == "vanilla" or run["seed"] not in base:
            continue
        vanilla = base[run["seed"]]
        last = min(r["steps"] * (1 - r["config"]["optimizer"]["decay_share"]) for r in (run, vanilla))
        losses = dict(vanilla["curve"])
        for step, loss in run["curve"]:
            if step in losses and step <= last:
                tokens = step * run["tokens"] / run["steps"]
                differences.setdefault(run["group"], {}).setdefault(tokens, []).append(loss - losses[step])
    return {name: [(x, statistics.fmean(values)) for x, values in by.items()] for name, by in differences.items()}


def depth_figure(folder: Path = HERE) -> list[Path]:
    """Draw what the depth of a trained model's tokens goes with, from `mor inspect --analysis`."""
    written = []
    for path in sorted(folder.glob("*/results/*.analysis.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Correlate(c["name"], [Group(**group) for group in c["groups"]], c["spearman"]) for c in values["depth_by"]
        ]
        written += plot_correlates(DOCS / "images" / f"depth-by-{path.name.split('.')[0]}", found, values["mode"])
    return written

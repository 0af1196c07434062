"""Write docs/results.md and its figures from experiments/*/results/*.json.

python experiments/report.py
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import CLAIMS, Claim

from mor_jax.errors import UserError
from mor_jax.evaluate.analysis_plots import plot_correlates
from mor_jax.evaluate.correlates import Correlate, Group
from mor_jax.sweep.fit import fit_isoflop
from mor_jax.sweep.plots import plot_depth_curves, plot_isoflop, plot_pareto
from mor_jax.sweep.table import group_summary

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SEED_NOISE = 0.005
"""Standard deviation of the loss between seeds that isoFLOP bands assume (see the spread of mor_vs_baselines)."""
Result = Mapping[str, Any]

_HEAD = """# Results

Written by `python experiments/report.py` from the JSON files in `experiments/*/results`; do not edit. Loss is nats per
token on held-out text. **Causal** is what generation attains: selection by threshold. *topk* looks ahead along the row,
as training does and as the paper evaluates; it stands beside it. Effects are differences of loss, negative is better.
The paper's are of 360M-parameter models trained on 10 to 31 billion tokens (about 30 to 90 tokens a parameter); ours
are of the scale `small` below, tens of times smaller and trained on a few tokens a parameter, so the direction of an
effect is what can be compared, not its size.

**Read with care.** The runs below last some hundred to a thousand optimiser steps: they measure the start of training,
where differences are ten and more times the paper's. They show that the tools work and how the router behaves, not
which architecture wins after billions of tokens; the folders' outcomes say what speaks for and against each figure. One
seed has no spread.
"""


def load_results(folder: Path) -> dict[str, list[Result]]:
    """Return the results of every experiment, by the name of its folder."""
    found: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*/results/*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, list):
            found.setdefault(path.parent.parent.name, []).extend(values)
    return found


def claims_table(results: Mapping[str, Sequence[Result]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the paper's effects beside ours; an effect whose runs are missing says 'not run'."""
    lines = [
        "| claim | paper (table) | ours, causal | ours, topk | seeds | agrees in direction |",
        "|---|---|---|---|---|---|",
    ]
    for claim in claims:
        groups = {row["group"]: row for row in group_summary(results.get(claim.experiment, ()))}
        ours, base = groups.get(claim.group, {}), groups.get(claim.baseline, {})
        cells = [claim.says, f"{claim.paper:+.4f} ({claim.table})", *_effect_cells(claim, ours, base)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _effect_cells(claim: Claim, ours: Result, base: Result) -> list[str]:
    if not ours.get("seeds") or not base.get("seeds"):
        return ["not run", "not run", "", ""]
    seeds = f"{ours['seeds']} / {base['seeds']}"
    ahead = _look_ahead(ours) - _look_ahead(base) if _look_ahead(ours) and _look_ahead(base) else math.nan
    topk = "" if math.isnan(ahead) else f"{ahead:+.4f}"
    if "nll" not in ours or "nll" not in base:
        return ["no causal boundary", topk, seeds, _agrees(claim.paper, ahead, 0.0) + " (topk)" if topk else ""]
    effect = ours["nll"] - base["nll"]
    error = _standard_error(ours, base)
    spread = f" ± {error:.4f}" if error else ""
    return [f"{effect:+.4f}{spread}", topk, seeds, _agrees(claim.paper, effect, error)]


def _look_ahead(row: Result) -> float:
    """Loss by top-k; without a router there is only one loss."""
    return row.get("topk_nll", row.get("nll", 0.0))


def _standard_error(ours: Result, base: Result) -> float:
    """Of the difference of two means over seeds; 0 where either has one seed only."""
    if "nll_spread" not in ours or "nll_spread" not in base:
        return 0.0
    return math.sqrt(ours["nll_spread"] ** 2 / ours["seeds"] + base["nll_spread"] ** 2 / base["seeds"])


def _agrees(paper: float, effect: float, error: float) -> str:
    if error and abs(effect) < 2 * error:
        return "within two standard errors of none"
    return "yes" if paper * effect > 0 else "**no**"


def runs_table(results: Sequence[Result]) -> str:
    """Return one row per group: costs and losses, means over seeds with the standard deviation."""
    lines = [
        "| model | parameters | tokens | training FLOPs | serving FLOPs/token "
        "| causal | bits/byte | topk | gap | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in group_summary(results):
        one = next((r for r in results if r["group"] == row["group"] and r["state"] == "done"), None)
        if one is None:
            states = sorted({r["state"] for r in results if r["group"] == row["group"]})
            parameters = next(r["parameters"] for r in results if r["group"] == row["group"])
            lines.append(f"| {row['group']} | {parameters / 1e6:.1f}M | {', '.join(states)} |" + " |" * 7)
            continue
        losses = [_mean(row, name, form) for name, form in _LOSSES]
        costs = [f"{one['parameters'] / 1e6:.1f}M", f"{one['tokens'] / 1e6:.1f}M", f"{one['train_flops']:.3g}"]
        cells = [row["group"], *costs, f"{one['serving_flops_per_token'] / 1e6:.1f}M", *losses, str(row["seeds"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_LOSSES = (("nll", "{:.4f}"), ("bits_per_byte", "{:.4f}"), ("topk_nll", "{:.4f}"), ("gap", "{:+.4f}"))


def _mean(row: Result, name: str, form: str) -> str:
    if row.get(name) is None:
        return ""
    spread = row.get(f"{name}_spread")
    return form.format(row[name]) + ("" if spread is None else f" ± {spread:.4f}")


def router_table(results: Sequence[Result]) -> str:
    """Return what the router of every finished run did: gap, boundary, dead positions, depths."""
    lines = [
        "| run | gap | gap, calibrated | boundary decides as topk, by recursion | dead positions | tokens by depth |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        if result["state"] == "done" and "tokens_per_depth" in result:
            accuracy = ", ".join(f"{share:.3f}" for share in result.get("threshold_accuracy", []))
            depths = ", ".join(f"{share:.2f}" for share in result["tokens_per_depth"])
            gap = "" if result.get("gap") is None else f"{result['gap']:+.4f}"
            fixed = f"{result['calibrated']['gap']:+.4f}" if "calibrated" in result else ""
            lines.append(
                f"| {result['name']} | {gap} | {fixed} | {accuracy} | {result['dead_token_ratio']:.3f} | {depths} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def machines(results: Sequence[Result]) -> str:
    """Say on what, with what and by which command the runs were made, and how long they took."""
    done = [result for result in results if result["state"] == "done"]
    if not done:
        return "not run\n"
    seen = {}
    for result in done:
        machine = result["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        seen[(machine["device"], versions, machine["python"])] = machine["command"]
    seconds = sum(result["seconds"] for result in done)
    lines = [
        f"- {device}, Python {python}, {versions}: `{command}`" for (device, versions, python), command in seen.items()
    ]
    shared = f"- {len(done)} of {len(results)} runs done, {seconds:.0f} process seconds (processes shared the device)"
    return "\n".join([*lines, shared]) + "\n"


_NOT_COMPARED = ("learning_rate", "early_training")
"""Searches for a cause, at other budgets than the comparisons."""


def figures(results: Mapping[str, Sequence[Result]]) -> list[Path]:
    """Draw the quality/compute front and the test-time scaling curve, as far as there are runs for them."""
    done = [r for group in results.values() for r in group if r["state"] == "done" and r.get("nll") is not None]
    written = []
    compared = [r for r in done if not any(r in results.get(name, ()) for name in _NOT_COMPARED)]
    if compared:
        costs = {"training FLOPs": "train_flops", "serving FLOPs per token": "serving_flops_per_token"}
        panels = {label: [(r["name"], r[key], r["nll"]) for r in compared] for label, key in costs.items()}
        written += plot_pareto(DOCS / "images" / "pareto", panels, "causal loss (nats/token)")
    curves = {r["name"]: [(p["max_depth"], p["nll"]) for p in r["depth_curve"]] for r in done if "depth_curve" in r}
    if curves:
        written += plot_depth_curves(DOCS / "images" / "test-time-scaling", curves, "cap on the passes of a token")
    for family in ("vanilla", "expert-r3"):
        points = isoflop_points([r for r in done if r["name"].startswith(f"{family}-d")])
        if points:
            try:
                fit = fit_isoflop(points, noise=SEED_NOISE)
            except UserError as error:
                print(f"isoFLOP, {family}: {error}")
                continue
            written += plot_isoflop(DOCS / "images" / f"isoflop-{family}", points, fit, f"isoFLOP, {family}")
    return written


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


def isoflop_points(results: Sequence[Result]) -> dict[float, list[tuple[float, float]]]:
    """Return (parameters without embedding, causal loss) by budget, for budgets with three sizes or more."""
    points: dict[float, list[tuple[float, float]]] = {}
    for result in results:
        if result["group"] == result["name"] and "-d" in result["name"]:  # runs of a plan, not of seeds
            budget = float(result["name"].rsplit("-", 1)[-1] if "e+" in result["name"] else 0)
            points.setdefault(budget, []).append((result["non_embedding"], result["nll"]))
    return {budget: runs for budget, runs in points.items() if budget and len({size for size, _ in runs}) >= 3}


def _other_tables(folder: Path) -> str:
    """Tables of lm-eval and of text by source that lie beside the sweeps' results as JSON objects."""
    parts = []
    for path in sorted(folder.glob("*/results/*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.split(".")[0]
        if isinstance(values, dict) and "tasks" in values:
            parts.append(f"### lm-eval: {name} (step {values['step']}, selection {values['mode']})\n\n{_tasks(values)}")
        if isinstance(values, dict) and "sources" in values:
            window = f"window {values['context']}, stride {values['stride']}"
            parts.append(f"### Loss by source: {name}, {window}\n\n{_sources(values)}")
    return "\n".join(parts)


def _tasks(values: Result) -> str:
    lines = ["| task | documents | acc | acc_norm | perplexity |", "|---|---|---|---|---|"]
    for name, row in values["tasks"].items():
        cells = [
            "" if row.get(key) is None else f"{row[key]:.4g}" for key in ("samples", "acc", "acc_norm", "perplexity")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sources(values: Result) -> str:
    names = [name for name in values["sources"]["all"] if name not in ("tokens", "bytes")]
    lines = ["| source | tokens | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for source, row in values["sources"].items():
        lines.append(f"| {source} | {row['tokens']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


_FIGURES = (
    ("Quality against compute", "pareto"),
    ("Test-time scaling", "test-time-scaling"),
    ("What the depth of a token goes with (MoR, N_r = 3)", "depth-by-expert-r3-s0"),
)


def report(folder: Path = HERE) -> str:
    """Return docs/results.md."""
    results = load_results(folder)
    parts = [_HEAD, "## The paper's claims and ours\n", claims_table(results)]
    for path in sorted(folder.glob("*/sweep.*")):
        name = path.parent.name
        parts.append(f"## {name}\n\n[What, how, outcome](../experiments/{name}/README.md)\n")
        mine = results.get(name, [])
        parts += [runs_table(mine), router_table(mine), machines(mine)] if mine else ["not run\n"]
    parts += ["## Trained models on tasks and texts\n", _other_tables(folder) or "not run\n"]
    for title, name in _FIGURES:
        drawn = (DOCS / "images" / f"{name}.png").exists()
        parts.append(f"## {title}\n\n" + (f"![{title}](images/{name}.png)\n" if drawn else "not run\n"))
    return "\n".join(part for part in parts if part)


def main() -> int:
    """Write the page and the figures."""
    for path in [*figures(load_results(HERE)), *depth_figure()]:
        print(path)
    (DOCS / "results.md").write_text(report(), encoding="utf-8")
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

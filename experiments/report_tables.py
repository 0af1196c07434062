"""Tables of docs/results.md that show what the runs of one experiment and scale came to."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mor_jax.sweep.table import group_summary

Result = Mapping[str, Any]


def runs_table(results: Sequence[Result]) -> str:
    """Return one row per group: costs and losses, means over seeds with their spread; then what is missing."""
    lines = [
        "| model | parameters | tokens | training FLOPs | serving FLOPs/token "
        "| causal (± sd of the seeds) | causal, calibrated | bits/byte | topk | gap | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    missing: dict[str, list[str]] = {}
    for row in group_summary(results):
        one = next((r for r in results if r["group"] == row["group"] and r["state"] == "done"), None)
        if one is None:
            states = sorted({r["state"] for r in results if r["group"] == row["group"]})
            missing.setdefault(", ".join(states), []).append(row["group"])
            continue
        losses = [_mean(row, name, form) for name, form in _LOSSES]
        losses.insert(1, _calibrated_mean([r for r in results if r["group"] == row["group"]]))
        costs = [f"{one['parameters'] / 1e6:.1f}M", f"{one['tokens'] / 1e6:.1f}M", f"{one['train_flops']:.3g}"]
        cells = [row["group"], *costs, f"{one['serving_flops_per_token'] / 1e6:.1f}M", *losses, str(row["seeds"])]
        lines.append("| " + " | ".join(cells) + " |")
    parts = ["\n".join(lines)] if len(lines) > 2 else []
    parts += [f"{state.capitalize()}: {', '.join(groups)}." for state, groups in missing.items()]
    return "\n\n".join(parts) + "\n"


_LOSSES = (("nll", "{:.4f}"), ("bits_per_byte", "{:.4f}"), ("topk_nll", "{:.4f}"), ("gap", "{:+.4f}"))


def _calibrated_mean(members: Sequence[Result]) -> str:
    """Causal loss with calibrated boundaries; empty unless it was measured of every finished run of the group."""
    done = [member for member in members if member["state"] == "done"]
    losses = [member["calibrated"]["nll"] for member in done if "nll" in member.get("calibrated", {})]
    if len(losses) < len(done):
        return ""
    spread = {"nll_spread": statistics.stdev(losses)} if len(losses) > 1 else {}
    return _mean({"nll": statistics.fmean(losses), **spread}, "nll", "{:.4f}")


def _mean(row: Result, name: str, form: str) -> str:
    if row.get(name) is None:
        return ""
    spread = row.get(f"{name}_spread")
    return form.format(row[name]) + ("" if spread is None else f" ± {spread:.4f}")


def router_table(results: Sequence[Result]) -> str:
    """Return what the router of every finished run did: losses, gap, boundary, dead positions, depths."""
    lines = [
        "| run | topk | causal | gap | gap, calibrated | boundary decides as topk, by recursion | dead positions "
        "| tokens by depth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if result["state"] == "done" and "topk_nll" in result:
            losses = [_optional(result.get(name), form) for name, form in _ROUTED]
            fixed = _optional(result.get("calibrated", {}).get("gap"), "{:+.4f}")
            accuracy = ", ".join(f"{share:.3f}" for share in result.get("threshold_accuracy", []))
            dead = _optional(result.get("dead_token_ratio"), "{:.3f}")
            depths = ", ".join(f"{share:.2f}" for share in result.get("tokens_per_depth", []))
            cells = [result["name"], *losses, fixed, accuracy, dead, depths]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


_ROUTED = (("topk_nll", "{:.4f}"), ("nll", "{:.4f}"), ("gap", "{:+.4f}"))


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


_LEAST_COMPARED = 2
_WIDE = 0.001
"""Gap, nats per token, from which on a run is named."""


def gap_summary(results: Sequence[Result]) -> str:
    """Say how wide the gap is over the expert-choice runs, as trained and with calibrated boundaries."""
    done = [r for r in results if r["state"] == "done" and r["config"]["model"]["routing"]["kind"] == "expert"]
    trained = {r["name"]: r["gap"] for r in done if r.get("gap") is not None}
    fixed = {r["name"]: r["calibrated"]["gap"] for r in done if "calibrated" in r}
    if len(trained.keys() & fixed.keys()) < _LEAST_COMPARED:
        return ""
    wide = [name for name in sorted(fixed, key=lambda name: -abs(trained.get(name, 0.0))) if name in trained]
    wide = [name for name in wide if abs(trained[name]) >= _WIDE]
    others = [abs(gap) for name, gap in fixed.items() if name not in wide]
    parts = [f"{name} from {trained[name]:+.4f} to {fixed[name]:+.4f}" for name in wide]
    parts += [f"the others are within {max(others):.4f}"] if others else []
    least, most = min(trained.values()), max(trained.values())
    return f"as trained {least:+.4f} to {most:+.4f} ({len(trained)} runs); calibrated, {', '.join(parts)}.\n"


def depth_table(results: Sequence[Result]) -> str:
    """Return the causal loss of every run that was measured with a cap on the passes; empty if none was."""
    measured = [result for result in results if result["state"] == "done" and "depth_curve" in result]
    if not measured:
        return ""
    most = max(len(result["depth_curve"]) for result in measured)
    lines = ["| run | " + " | ".join(str(cap + 1) for cap in range(most)) + " |", "|---|" + "---|" * most]
    for result in measured:
        cells = [f"{point['nll']:.4f}" for point in result["depth_curve"]]
        lines.append(f"| {result['name']} | {' | '.join([*cells, *[''] * (most - len(cells))])} |")
    return "\n".join(lines) + "\n"


def machines(results: Sequence[Result]) -> str:
    """Say on what, with what and by which command the runs were made, and how long they took."""
    done = [result for result in results if result["state"] == "done"]
    if not done:
        return "not run\n"
    seen = []
    for result in done:
        machine = result["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        line = f"- {machine['device']}, Python {machine['python']}, {versions}: `{machine['command']}`"
        seen += [] if line in seen else [line]
    seconds = sum(result["seconds"] for result in done)
    shared = f"- {len(done)} of {len(results)} runs done, {seconds:.0f} process seconds (processes shared the device)"
    return "\n".join([*seen, shared]) + "\n"


def source_table(results: Sequence[Result]) -> str:
    """Return the causal loss by source of held-out text, and the look-ahead loss and the gap over all of it.

    Means over the seeds of a group, those with calibrated boundaries in a row of their own; empty if no run was
    measured on text.
    """
    measured: dict[str, list[Result]] = {}
    for result in results:
        for suffix, owner in (("", result), (", calibrated", result.get("calibrated", {}))):
            if result["state"] == "done" and "text" in owner:
                measured.setdefault(result["group"] + suffix, []).append(owner["text"]["sources"])
    if not measured:
        return ""
    sources = list(next(iter(measured.values()))[0])
    lines = [
        "| model | " + " | ".join(sources) + " | all, topk | gap | seeds |",
        "|---|" + "---|" * (len(sources) + 3),
    ]
    for group, seeds in measured.items():
        means = [statistics.fmean(_causal(texts[source]) for texts in seeds) for source in sources]
        cells = ["" if math.isnan(mean) else f"{mean:.4f}" for mean in means]
        both = [texts["all"] for texts in seeds if {"topk_nll", "threshold_nll"} <= texts["all"].keys()]
        ahead = [texts["all"]["topk_nll"] for texts in seeds if "topk_nll" in texts["all"]]
        gaps = [losses["threshold_nll"] - losses["topk_nll"] for losses in both]
        cells.append(f"{statistics.fmean(ahead):.4f}" if ahead else "")
        cells.append(f"{statistics.fmean(gaps):+.4f}" if gaps else "")
        lines.append(f"| {group} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def _causal(losses: Result) -> float:
    """Loss of one source by threshold; a model that selects nothing ahead has one loss only."""
    return next((losses[name] for name in ("threshold_nll", "nll") if name in losses), float("nan"))

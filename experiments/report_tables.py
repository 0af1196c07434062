"""Tables of docs/results.md that show what the runs of one experiment and scale came to."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mor_jax.sweep.table import group_summary

Result = Mapping[str, Any]


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


def source_table(results: Sequence[Result]) -> str:
    """Return the causal loss by source of held-out text, and the look-ahead loss and the gap over all of it.

    Means over the seeds of a group; empty if no run was measured on text.
    """
    measured: dict[str, list[Result]] = {}
    for result in results:
        if result["state"] == "done" and "text" in result:
            measured.setdefault(result["group"], []).append(result["text"]["sources"])
    if not measured:
        return ""
    sources = list(next(iter(measured.values()))[0])
    lines = [
        "| model | " + " | ".join(sources) + " | all, topk | gap | seeds |",
        "|---|" + "---|" * (len(sources) + 3),
    ]
    for group, seeds in measured.items():
        cells = [f"{statistics.fmean(_causal(texts[source]) for texts in seeds):.4f}" for source in sources]
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

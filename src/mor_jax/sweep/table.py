"""The one table at the end of a sweep: a row per run, then the mean and spread over the seeds of every group."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

_COLUMNS = (
    ("run", "name", "{}"),
    ("parameters", "parameters", "{:.3g}"),
    ("tokens", "tokens", "{:.3g}"),
    ("training FLOPs", "train_flops", "{:.3g}"),
    ("serving FLOPs/token", "serving_flops_per_token", "{:.3g}"),
    ("NLL, causal", "nll", "{:.4f}"),
    ("bits/byte, causal", "bits_per_byte", "{:.4f}"),
    ("NLL, topk", "topk_nll", "{:.4f}"),
    ("gap", "gap", "{:+.4f}"),
    ("dead", "dead_token_ratio", "{:.3f}"),
    ("seconds", "seconds", "{:.0f}"),
)
_GROUP_FIGURES = ("nll", "bits_per_byte", "topk_nll", "gap", "dead_token_ratio")


def markdown_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table; a run without figures says so in its row."""
    columns = [column for column in _COLUMNS if column[1] == "name" or any(column[1] in r for r in results)]
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cells(result, columns)) + " |" for result in results]
    return "\n".join(lines) + "\n"


def _cells(result: Result, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = []
    for _, key, form in columns:
        value = result.get(key)
        cells.append("" if value is None else form.format(value))
    if result["state"] != "done":
        why = f": {result['why']}" if result.get("why") else ""
        cells[-1] = f"{result['state']}{why}"
    return cells


def group_summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Average over the seeds of every group.

    Args:
        results: of ``run_sweep``; only finished runs count.

    Returns:
        Per group, in order of appearance: ``group``, ``seeds`` (how many), and for each figure its mean and, from two
        seeds on, ``FIGURE_spread``: the sample standard deviation.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["group"], []).append(result)
    return [_summary(name, members) for name, members in groups.items()]


def _summary(name: str, members: Sequence[Result]) -> dict[str, Any]:
    done = [member for member in members if member["state"] == "done"]
    summary: dict[str, Any] = {"group": name, "seeds": len(done)}
    for figure in _GROUP_FIGURES:
        values = [member[figure] for member in done if member.get(figure) is not None]
        if values:
            summary[figure] = statistics.fmean(values)
        if len(values) > 1:
            summary[f"{figure}_spread"] = statistics.stdev(values)
    return summary


def group_table(results: Sequence[Result]) -> str:
    """Return the groups of more than one run as a Markdown table, or "" if there are none."""
    several = {r["group"] for r in results if r["group"] != r["name"]}
    rows = [summary for summary in group_summary(results) if summary["group"] in several]
    if not rows:
        return ""
    lines = ["| group | seeds | NLL, causal (± sd of the seeds) | gap (± sd) |", "|---|---|---|---|"]
    for row in rows:
        cells = [_with_spread(row, "nll", "{:.4f}"), _with_spread(row, "gap", "{:+.4f}")]
        lines.append(f"| {row['group']} | {row['seeds'] or 'not run'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_spread(row: Mapping[str, Any], figure: str, form: str) -> str:
    if figure not in row:
        return ""
    spread = row.get(f"{figure}_spread")
    return form.format(row[figure]) + ("" if spread is None else f" ± {spread:.4f}")

"""Print tables of what scale.py measured: efficiency by layout and cards, and where the time of each case goes.

python experiments/scaling/scaling_table.py experiments/scaling/results/cpu-debug
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layouts import FAMILIES, LAYOUTS, SIZES, Case, all_cases, why_not

Row = Mapping[str, Any]


def load(folder: Path) -> list[Row]:
    """Every case's file."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def efficiency_table(rows: Sequence[Row]) -> str:
    """Markdown: tokens/s over cards times one card's; `<` is below what is asked, `(v)` MoR below vanilla."""
    by_case = {Case(**row["case"]): row for row in rows}
    counts = sorted({case.cards for case in by_case if case.cards > 1})
    lines = [["size", "layout", "processes", "family", *map(str, counts)], ["---"] * 4 + ["---:"] * len(counts)]
    for size in SIZES:
        for layout in LAYOUTS:
            for per_card in (False, True):
                for family in FAMILIES:
                    cases = [Case(size, family, layout, n, per_card, long=layout == "context2") for n in counts]
                    if any(case in by_case for case in cases):
                        how = "one per card" if per_card else "one"
                        cells = [_efficiency(case, by_case) for case in cases]
                        lines.append([size, layout, how, family, *cells])
    return _markdown(lines)


def _efficiency(case: Case, by_case: Mapping[Case, Row]) -> str:
    if case not in by_case:
        return ""
    found = by_case[case]["efficiency"]
    if found is None:
        return "failed"
    below = " <" if found < SIZES[case.size].wanted else ""
    vanilla = by_case.get(replace(case, family="vanilla"), {}).get("efficiency")
    return f"{found:.3f}{below}{' (v)' if vanilla is not None and found < vanilla else ''}"


def time_table(rows: Sequence[Row]) -> str:
    """Markdown: per case and step the bytes that a card receives and the time of communication, hidden or not."""
    head = [
        "case",
        "tokens/s",
        "ms",
        "+-",
        "MB received",
        "communication ms",
        "exposed ms",
        "exposed",
        "idle ms",
        "GiB",
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        measured = row["measured"]
        if "error" in measured:
            lines.append([row["name"], "failed: " + measured["error"].splitlines()[-1][:100], *[""] * (len(head) - 2)])
            continue
        step = measured["step_seconds"]
        cells = [f"{measured['tokens_per_second']:,.0f}", _ms(step), f"{measured['step_seconds_spread']:.0%}"]
        devices = measured.get("profile", {}).get("communication", [])
        received = measured["collectives"]
        cells.append(
            "?" if received is None else f"{sum(k['bytes'] + k['bytes_across'] for k in received.values()) / 1e6:.1f}"
        )
        if devices:
            mean = {
                name: sum(d[name] for d in devices) / len(devices)
                for name in ("seconds", "exposed_seconds", "idle_seconds")
            }
            exposed = mean["exposed_seconds"]
            cells += [_ms(mean["seconds"]), _ms(exposed), f"{exposed / step:.1%}", _ms(mean["idle_seconds"])]
        else:
            cells += [""] * 4
        peak = measured["peak_bytes"]
        lines.append([row["name"], *cells, "" if peak is None else f"{peak / 2**30:.1f}"])
    return _markdown(lines)


def left_out(rows: Sequence[Row]) -> str:
    """Say which cases have no figure up to the largest number of cards, and by which rule where there is one."""
    cases = {Case(**row["case"]) for row in rows}
    sizes = [size for size in SIZES if any(case.size == size for case in cases)]
    ruled: dict[str, list[str]] = {}
    absent = []
    for case in all_cases(sizes, max(case.cards for case in cases)):
        reason = why_not(case)
        if reason is not None:
            ruled.setdefault(reason, []).append(case.name)
        elif case not in cases:
            absent.append(case.name)
    lines = [f"Left out by rule ({reason}): {', '.join(names)}." for reason, names in ruled.items()]
    return "\n\n".join([*lines, f"Not run: {', '.join(absent) or 'none'}."])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables of a folder."""
    rows = load(Path(sys.argv[1]))
    first = next(row["measured"] for row in rows if "error" not in row["measured"])
    print(f"{first['device']} ({first['platform']}), {first['versions']}\n")
    print(efficiency_table(rows), time_table(rows), left_out(rows), sep="\n\n")


if __name__ == "__main__":
    main()

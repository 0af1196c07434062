"""Write the ablation's table from its results: python experiments/isoflop/table.py RESULTS.json [--out TABLE.md]."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from ablation import BASE, FIRST, FRESH, Ablation, loss_on, name_of, verdict
from models import FAMILIES

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    results: Annotated[Path, tyro.conf.Positional]
    """What `run.py` wrote."""
    out: Path | None = None
    """File to write; None prints."""


def table(ablation: Ablation, results: Mapping[str, Result]) -> str:
    """Return both tables: sizes and rates that were tried, and what became of every part."""
    parts = ["Widths and rates, seed 0, causal nats per token on `choose`:\n\n", _sizes(ablation, results)]
    parts.append(
        "\nEffect on the causal loss with its 95% t-interval over paired seeds, negative is better; decided on "
        "`choose`, reported on `report`:\n\n"
        f"| part | family | `choose`, seeds {_listed(FIRST)} | `choose`, seeds {_listed(FRESH)} | `report`, all seeds "
        "| verdict |\n|---|---|---|---|---|---|\n"
    )
    for part in ablation.parts:
        for family in part.families:
            first, fresh = (ablation.effect(results, part, family, seeds) for seeds in (FIRST, FRESH))
            reported = ablation.effect(results, part, family, FIRST + FRESH, "report")
            becomes = verdict(first, fresh, part.repeated) + ", deleted" * (family in part.deleted)
            parts.append(f"| {' | '.join([part.says, family, *map(_cell, (first, fresh, reported)), becomes])} |\n")
    return "".join(parts) + _gaps(results.values())


def _gaps(results: Iterable[Result]) -> str:
    """Say how far selection by running boundaries is from looking ahead."""
    routed = [result for result in results if result.get("topk_nll") is not None]
    if not routed:
        return ""
    gaps = sorted((abs(result["nll"] - result["topk_nll"]) for result in routed), reverse=True)
    sources = [result.get("report", {}).get("sources", {}).get("all", {}) for result in routed]
    reported = [abs(s["threshold_nll"] - s["topk_nll"]) for s in sources if "threshold_nll" in s and "topk_nll" in s]
    told = f" and {max(reported):.4f} on `report`" if reported else ""
    return (
        f"\nCausal less look-ahead loss of {len(gaps)} runs with running boundaries, not calibrated: at most "
        f"{gaps[0]:.4f} on `choose` (then {gaps[min(1, len(gaps) - 1)]:.4f}){told}.\n"
    )


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))


def _cell(effect: Any) -> str:
    return "" if effect is None else f"{effect} ({effect.seeds} seed{'s' * (effect.seeds > 1)})"


def _sizes(ablation: Ablation, results: Mapping[str, Result]) -> str:
    lines = ["| run | parameters without embedding | tokens for each | causal | |", "|---|---|---|---|---|"]
    best = {name_of(family, BASE, 0, *ablation.best(results, family, BASE)) for family in FAMILIES}
    for run in ablation.sizes(results):
        result = results.get(run.name)
        loss = loss_on(result)
        if result is None or loss is None:
            lines.append(f"| {run.name} | | | {'not run' if result is None else result['state']} | |")
            continue
        each = result["tokens"] / result["non_embedding"]
        mark = "taken" if run.name in best else ""
        lines.append(f"| {run.name} | {result['non_embedding'] / 1e6:.2f}M | {each:.1f} | {loss:.4f} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table."""
    options = tyro.cli(Arguments, description=__doc__)
    values = json.loads(options.results.read_text(encoding="utf-8"))
    text = table(Ablation(values["scale"]), {row["name"]: row for row in values["results"]})
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw the results: python experiments/reasoning/figures.py RESULTS.json --out experiments/reasoning/results.

One picture a task: accuracy by difficulty and model, passes by difficulty, accuracy by passes.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.figure import Figure
from ranking import group_name
from reasoners import FAMILIES, scale_of
from tables import Results, done, mean_curve


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    results: Annotated[Path, tyro.conf.Positional]
    """What `run.py` wrote."""
    out: Path = Path("experiments/reasoning/results")
    """Folder of the pictures, TASK.png."""


def draw(results: Results, task: str, recursions: int) -> Figure | None:
    """Draw one task; None if nothing of it was run."""
    runs = {family: list(done(results, group_name(task, family, recursions)).values()) for family in FAMILIES}
    runs = {family: found for family, found in runs.items() if found}
    if not runs:
        return None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    accuracy, passes, capped = figure.subplots(1, 3)
    colours = dict(zip(FAMILIES, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for family, found in runs.items():
        style: dict[str, Any] = {"color": colours[family], "label": family, "marker": "o", "markersize": 3}
        accuracy.plot(*_by_difficulty(found, "accuracy"), **style)
        if "passes" in found[0]:
            passes.plot(*_by_difficulty(found, "passes"), **style)
        if "by_passes" in found[0]:
            curve = mean_curve(found)
            capped.plot(list(curve), list(curve.values()), **style)
    accuracy.set(xlabel="difficulty", ylabel="accuracy, held out", ylim=(0, 1.02), title=task)
    passes.set(xlabel="difficulty", ylabel="mean passes of answers", title="who gets the passes")
    capped.axvline(recursions, color="grey", linewidth=0.8, linestyle=":")
    capped.set(xlabel="passes allowed (dotted: trained)", ylabel="mean accuracy", title="accuracy by passes")
    accuracy.legend(fontsize=8)
    return figure


def _by_difficulty(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    difficulties = sorted(map(int, runs[0][name]))
    return difficulties, [float(np.mean([run[name][str(d)][0] for run in runs])) for d in difficulties]


def main() -> int:
    """Draw every task that was run."""
    options = tyro.cli(Arguments, description=__doc__)
    values = json.loads(options.results.read_text(encoding="utf-8"))
    results = {row["name"]: row for row in values["results"]}
    scale = scale_of(values["scale"])
    options.out.mkdir(parents=True, exist_ok=True)
    for task in scale.widths:
        figure = draw(results, task, scale.recursions[0])
        if figure is not None:
            figure.savefig(options.out / f"{task}.png", dpi=120)
            print(options.out / f"{task}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

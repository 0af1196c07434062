"""Write the tables from the results: python experiments/reasoning/tables.py RESULTS.json [--out TABLES.md]."""

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from ranking import CHEAPER, SEEDS, group_name
from reasoners import FAMILIES, scale_of

from mor_jax.sweep.paired import PairedDifference, paired_difference

Result = Mapping[str, Any]
Results = Mapping[str, Result]
_BINS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32))
_ROUTED = ("expert", "grown", "token")
_MARGIN = 0.01
"""Accuracy that a model must gain on average to be better, and may be behind to do the same."""
_OPEN = "open: the interval holds both"


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    results: Annotated[Path, tyro.conf.Positional]
    """What `run.py` wrote."""
    out: Path | None = None
    """File to write; None prints."""


def done(results: Results, group: str) -> dict[int, Result]:
    """Return the measured runs of a group by seed."""
    found = {seed: results.get(f"{group}-s{seed}") for seed in SEEDS}
    return {seed: result for seed, result in found.items() if result is not None and "accuracy" in result}


def binned(accuracy: Mapping[str, Sequence[float]]) -> list[float | None]:
    """Return the accuracy of ranges of difficulties, each difficulty of the same weight; None where there is none."""
    ranges = ([mean for d, (mean, _) in accuracy.items() if low <= int(d) <= high] for low, high in _BINS)
    return [float(np.mean(means)) if means else None for means in ranges]


def accuracy_table(results: Results, task: str, recursions: int) -> list[str]:
    """Accuracy by difficulty of every family, and at equal FLOPs; means over seeds."""
    names = [f"{low}" if low == high else f"{low}-{high}" for low, high in _BINS]
    lines = [
        f"| {task} | seeds | parameters without embedding | training FLOPs | mean | {' | '.join(names)} |",
        "|---" * (5 + len(names)) + "|",
    ]
    for equal_flops in (False, True):
        for family in CHEAPER if equal_flops else FAMILIES:
            runs = list(done(results, group_name(task, family, recursions, equal_flops=equal_flops)).values())
            if not runs:
                continue
            bins = [_mean(values) for values in zip(*(binned(run["accuracy"]) for run in runs), strict=True)]
            cells = [
                f"{family}{', equal FLOPs' * equal_flops}",
                str(len(runs)),
                f"{runs[0]['non_embedding'] / 1e6:.2f}M",
                f"{runs[0]['train_flops']:.2e}",
                _percent(_mean([run["mean_accuracy"] for run in runs])),
                *map(_percent, bins),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def correlation_table(results: Results, tasks: Sequence[str], recursions: Sequence[int]) -> list[str]:
    """Rank correlation of passes with difficulty, and who takes more passes in a row of both."""
    lines = [
        "| run | router | same passes at random | same passes, difficulty known | hard more / equal / fewer |",
        "|---" * 5 + "|",
    ]
    for passes, equal_flops, task, family in itertools.product(recursions, (False, True), tasks, _ROUTED):
        for seed, run in done(results, group_name(task, family, passes, equal_flops=equal_flops)).items():
            correlation, rows = run["correlation"], run["easy_and_hard"]["rows"]
            cells = [run["name"], *(_interval(correlation[name]) for name in ("router", "random", "knowing"))]
            cells.append(" / ".join(_percent(rows[order]) for order in ("more", "equal", "fewer")))
            assert run["seed"] == seed
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def passes_table(results: Results, tasks: Sequence[str], recursions: int) -> list[str]:
    """Mean accuracy by the passes that are allowed, or given beyond training."""
    lines = [f"| model | {' | '.join(map(str, range(1, 2 * recursions + 1)))} |", "|---" * (1 + 2 * recursions) + "|"]
    for task, equal_flops in itertools.product(tasks, (False, True)):
        for family in (family for family in FAMILIES[2:] if not equal_flops or family in CHEAPER):
            runs = list(done(results, group_name(task, family, recursions, equal_flops=equal_flops)).values())
            if runs:
                curve = mean_curve(runs)
                cells = [_percent(curve.get(passes)) for passes in range(1, 2 * recursions + 1)]
                lines.append(f"| {task}, {family}{', equal FLOPs' * equal_flops} | {' | '.join(cells)} |")
    return lines


def mean_curve(runs: Sequence[Result]) -> dict[int, float]:
    """Return the mean accuracy of runs by passes, each difficulty of the same weight."""
    return {
        int(passes): float(np.mean([np.mean([mean for mean, _ in run["by_passes"][passes].values()]) for run in runs]))
        for passes in runs[0]["by_passes"]
    }


def statements(results: Results, tasks: Sequence[str], recursions: int) -> list[str]:
    """Say of every statement and task whether it holds, does not, or is open."""
    lines = ["| statement | task | measured | |", "|---|---|---|---|"]
    for task in tasks:
        for family in _ROUTED:
            runs = done(results, group_name(task, family, recursions))
            found = {seed: run["correlation"]["router"] for seed, run in runs.items()}
            if found:
                says = "; ".join(_interval(value) for value in found.values())
                lines.append(f"| harder answers take more passes ({family}) | {task} | {says} | {_follows(found)} |")
        lines += _comparisons(results, task, recursions)
    return lines


def _comparisons(results: Results, task: str, recursions: int) -> Iterator[str]:
    """Compare families by their mean accuracy, seed by seed."""
    mean = {family: _means(results, task, family, recursions) for family in FAMILIES}
    equal = {family: _means(results, task, family, recursions, equal_flops=True) for family in CHEAPER}
    beyond = {family: _means(results, task, family, recursions, 2 * recursions) for family in ("recursive", "drawn")}
    equal_beyond = _means(results, task, "drawn", recursions, 2 * recursions, equal_flops=True)
    recursive, blocks = mean["recursive"], f"{recursions} blocks"
    for says, ours, base, verdict in (
        (f"{recursions} passes of a block do what {blocks} do", recursive, mean["deep"], _same),
        (f"{recursions} passes of a block beat one (recursive - shallow)", recursive, mean["shallow"], _better),
        (
            f"{recursions} passes of a block beat one, equal training FLOPs",
            recursive,
            equal["shallow"],
            _better,
        ),
        ("twice the trained passes help (recursive)", beyond["recursive"], recursive, _better),
        ("twice the trained passes help (drawn)", beyond["drawn"], mean["drawn"], _better),
        (f"drawn passes do what {blocks} do, equal training FLOPs", equal["drawn"], mean["deep"], _same),
        (f"twice the drawn passes beat {blocks}, equal training FLOPs", equal_beyond, mean["deep"], _better),
        ("a router does what all passes do (expert - recursive)", mean["expert"], recursive, _same),
        ("a router does what all passes do, equal training FLOPs", equal["expert"], recursive, _same),
        ("a router does what drawn passes do (expert - drawn)", mean["expert"], mean["drawn"], _same),
        ("a router does what drawn passes do, equal training FLOPs", equal["expert"], equal["drawn"], _same),
    ):
        difference = paired_difference(ours, base)
        if difference is not None:
            yield f"| {says} | {task} | {difference} | {verdict(difference)} |"


def _means(
    results: Results, task: str, family: str, recursions: int, passes: int | None = None, *, equal_flops: bool = False
) -> dict[int, float]:
    """Mean accuracy by seed, each difficulty of the same weight; under ``passes``, or as trained."""
    runs = done(results, group_name(task, family, recursions, equal_flops=equal_flops))
    return {seed: run["mean_accuracy"] if passes is None else mean_curve([run])[passes] for seed, run in runs.items()}


def _follows(found: Mapping[int, Sequence[float] | None]) -> str:
    signs = {0 if value is None or value[1] <= 0 <= value[2] else np.sign(value[0]) for value in found.values()}
    if len(found) < len(SEEDS):
        return f"open: {len(found)} of {len(SEEDS)} seeds"
    return "holds" if signs == {1} else "does not hold"


def _better(difference: PairedDifference) -> str:
    if difference.half_width is None or difference.seeds < len(SEEDS):
        return f"open: {difference.seeds} of {len(SEEDS)} seeds"
    if difference.excludes_zero and difference.mean >= _MARGIN:
        return "holds"
    return "does not hold" if difference.mean + difference.half_width < _MARGIN else _OPEN


def _same(difference: PairedDifference) -> str:
    if difference.half_width is None or difference.seeds < len(SEEDS):
        return f"open: {difference.seeds} of {len(SEEDS)} seeds"
    if difference.mean - difference.half_width >= -_MARGIN:
        return "holds"
    return "does not hold" if difference.mean + difference.half_width < -_MARGIN else _OPEN


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _interval(value: Sequence[float] | None) -> str:
    return "constant" if value is None else f"{value[0]:+.2f} [{value[1]:+.2f}, {value[2]:+.2f}]"


def tables(scale: str, results: Results) -> str:
    """Return all tables as Markdown."""
    tasks, recursions = list(scale_of(scale).widths), scale_of(scale).recursions
    parts = ["Statements:", *statements(results, tasks, recursions[0])]
    parts += ["", "Passes and difficulty (Spearman, 95% bootstrap over rows):"]
    parts += ["", *correlation_table(results, tasks, recursions)]
    for count in recursions:
        for task in tasks:
            table = accuracy_table(results, task, count)
            if len(table) > 3:  # one line is the shallow model's, which has no N_r
                parts += ["", f"Accuracy by difficulty, N_r = {count}:", "", *table]
    parts += ["", "Mean accuracy by passes (more than trained without a router):"]
    parts += ["", *passes_table(results, tasks, recursions[0])]
    finished = sum(result["state"] == "done" for result in results.values())
    parts.insert(1, "")
    return "\n".join([f"{finished} of {len(results)} runs are done.", "", *parts]) + "\n"


def main() -> int:
    """Write the tables."""
    options = tyro.cli(Arguments, description=__doc__)
    values = json.loads(options.results.read_text(encoding="utf-8"))
    text = tables(values["scale"], {row["name"]: row for row in values["results"]})
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

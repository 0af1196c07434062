"""Write docs/results.md and its figures from experiments/*/results/*.json.

python experiments/report.py
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from claims import CLAIMS, Claim
from report_figures import DOCS, HERE, depth_figure, figures
from report_tables import Result, machines, router_table, runs_table, source_table

from mor_jax.sweep.table import group_summary

SCALES = ("long", "small")
"""Of the comparisons, the one that says more first; experiments may have others of their own."""

_HEAD = """# Results

Written by `python experiments/report.py` from the JSON files in `experiments/*/results`; do not edit. Loss is nats per
token on held-out text. **Causal** is what generation attains: selection by threshold. *topk* looks ahead along the row,
as training does and as the paper evaluates; it stands beside it. Effects are differences of loss, negative is better.
The paper's are of 360M-parameter models trained on 10 to 31 billion tokens (30 to 90 tokens a parameter); ours have
tens of times fewer parameters and see a few tokens for each, so the direction of an effect is what can be compared.

**Read with care.** Two scales are told apart. Runs of `small` measure the start of training, where MoR is ahead by ten
and more times the paper's effects; runs of `long` (fewer layers, smaller batches) go past the point where that lead is
gone (figure "Loss over training"). Neither says which architecture wins after billions of tokens. An effect of one seed
is called within the spread of seeds where it is smaller than what seeds of the same experiment differ by. The folders'
outcomes say what speaks for and against each figure.
"""


def load_results(folder: Path, scale: str | None = None) -> dict[str, list[Result]]:
    """Return the results of every experiment, by the name of its folder; ``scale`` is the name of the file."""
    found: dict[str, list[Result]] = {}
    for path in sorted(folder.glob(f"*/results/{scale or '*'}.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, list):
            found.setdefault(path.parent.parent.name, []).extend(values)
    return found


def scales_of(folder: Path, experiment: str = "*") -> list[str]:
    """Return the scales at which an experiment, or any, has results."""
    names = set()
    for path in folder.glob(f"{experiment}/results/*.json"):
        if isinstance(json.loads(path.read_text(encoding="utf-8")), list):
            names.add(path.stem)
    return sorted(names, key=lambda name: (SCALES.index(name) if name in SCALES else len(SCALES), name))


def claims_table(results: Mapping[str, Sequence[Result]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the paper's effects beside ours; an effect whose runs are missing says 'not run'."""
    lines = [
        "| claim | paper (table) | ours, causal | ours, topk | seeds | agrees in direction |",
        "|---|---|---|---|---|---|",
    ]
    for claim in claims:
        mine = results.get(claim.experiment, ())
        ours, base = _with_common_seeds(mine, claim)
        cells = [claim.says, f"{claim.paper:+.4f} ({claim.table})", *_effect_cells(claim, ours, base, _noise(mine))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_common_seeds(results: Sequence[Result], claim: Claim) -> tuple[Result, Result]:
    """Summaries of the two groups over the seeds that both finished: those runs saw the same batches."""
    pair = (claim.group, claim.baseline)
    done = {group: {r["seed"]: r for r in results if r["group"] == group and r["state"] == "done"} for group in pair}
    common = done[claim.group].keys() & done[claim.baseline].keys()
    summaries = [group_summary([r for seed, r in done[group].items() if seed in common]) for group in pair]
    ours, base = (summary[0] if summary else {} for summary in summaries)
    return ours, base


def _noise(results: Sequence[Result]) -> float:
    """Largest standard deviation between seeds in an experiment; 0 where every group has one."""
    return max((row.get("nll_spread", 0.0) for row in group_summary(results)), default=0.0)


def _effect_cells(claim: Claim, ours: Result, base: Result, noise: float) -> list[str]:
    if not ours.get("seeds") or not base.get("seeds"):
        return ["not run", "not run", "", ""]
    seeds = str(ours["seeds"])
    ahead = _look_ahead(ours) - _look_ahead(base) if _look_ahead(ours) and _look_ahead(base) else math.nan
    topk = "" if math.isnan(ahead) else f"{ahead:+.4f}"
    if "nll" not in ours or "nll" not in base:
        return ["no causal boundary", topk, seeds, _agrees(claim.paper, ahead, 0.0, noise) + " (topk)" if topk else ""]
    effect = ours["nll"] - base["nll"]
    error = _standard_error(ours, base)
    spread = f" ± {error:.4f}" if error else ""
    return [f"{effect:+.4f}{spread}", topk, seeds, _agrees(claim.paper, effect, error, noise)]


def _look_ahead(row: Result) -> float:
    """Loss by top-k; without a router there is only one loss."""
    return row.get("topk_nll", row.get("nll", 0.0))


def _standard_error(ours: Result, base: Result) -> float:
    """Of the difference of two means over seeds; 0 where either has one seed only."""
    if "nll_spread" not in ours or "nll_spread" not in base:
        return 0.0
    return math.sqrt(ours["nll_spread"] ** 2 / ours["seeds"] + base["nll_spread"] ** 2 / base["seeds"])


def _agrees(paper: float, effect: float, error: float, noise: float) -> str:
    """Compare directions; a difference of two single runs tells nothing below what seeds alone do."""
    if error and abs(effect) < 2 * error:
        return "within two standard errors of none"
    if not error and abs(effect) < math.sqrt(2) * noise:
        return f"{'same' if paper * effect > 0 else 'opposite'} sign, within the spread of seeds"
    return "yes" if paper * effect > 0 else "**no**"


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
    ("Loss over training", "training"),
    ("Test-time scaling", "test-time-scaling"),
    ("What the depth of a token goes with (MoR, N_r = 3)", "depth-by-expert-r3-s0"),
)


def report(folder: Path = HERE) -> str:
    """Return docs/results.md."""
    compared = [scale for scale in scales_of(folder) if scale in SCALES] or [SCALES[0]]
    parts = [_HEAD, "## The paper's claims and ours\n"]
    for scale in compared:
        parts += [f"### Scale `{scale}`\n", claims_table(load_results(folder, scale))]
    for path in sorted(folder.glob("*/sweep.*")):
        name = path.parent.name
        parts.append(f"## {name}\n\n[What, how, outcome](../experiments/{name}/README.md)\n")
        scales = scales_of(folder, name)
        for scale in scales:
            mine = load_results(folder, scale)[name]
            parts += [f"### {name}, scale `{scale}`\n", runs_table(mine), router_table(mine)]
            by_source = source_table(mine)
            parts += [f"Causal loss by source of held-out text:\n\n{by_source}"] if by_source else []
            parts.append(machines(mine))
        parts += [] if scales else ["not run\n"]
    parts += ["## Trained models on tasks and texts (scale `small`)\n", _other_tables(folder) or "not run\n"]
    for title, name in _FIGURES:
        drawn = (DOCS / "images" / f"{name}.png").exists()
        parts.append(f"## {title}\n\n" + (f"![{title}](images/{name}.png)\n" if drawn else "not run\n"))
    return "\n".join(part for part in parts if part)


def main() -> int:
    """Write the page, and the figures of the scale that says most."""
    scale = next((scale for scale in scales_of(HERE) if scale in SCALES), SCALES[0])
    for path in [*figures(load_results(HERE, scale)), *depth_figure()]:
        print(path)
    (DOCS / "results.md").write_text(report(), encoding="utf-8")
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write what the comparison came to, its tables and figures, from its results.

    python experiments/isoflop/outcome.py --out experiments/isoflop/OUTCOME.md

Figures (PNG and SVG) go to docs/images. ``first_screen`` is how docs/results.md begins. What was not run, says so.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import launch  # noqa: F401  the driver's place
import models
import tyro
from ablation import BASE as PLAIN
from ablation import FIRST, FRESH, PARTS, Ablation
from choices import paired
from comparison import Comparison
from measured import COSTS, Measured
from outcome_tables import Moved, at_budget, markdown, mean_of, tables, with_seeds

from mor_jax.sweep.isoflop_plots import plot_frontiers, plot_isoflop, plot_losses
from mor_jax.sweep.runs import SweepRun

RESULTS = Path(__file__).parent / "results" / "comparison.json"
IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"

_NOT_MEASURED = """Not measured yet. The runs that answer it, every family at its own best size for a budget, are
written and have not been run ([isoflop](../experiments/isoflop/README.md)). Until they are, nothing here says that MoR
beats the best plain Transformer of its budget. The appendix has older comparisons, each with what its baseline cannot
say.
"""


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    results: Annotated[Path, tyro.conf.Positional] = RESULTS
    """What `compare.py` wrote."""
    out: Path | None = None
    """File to write; None prints."""
    images: Path = IMAGES
    """Folder of the figures."""


def load(path: Path) -> Measured:
    """Read what `compare.py` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Measured(Comparison(values["scale"]), {row["name"]: row for row in values["results"]})


def first_screen(folder: Path = RESULTS.parent) -> str:
    """Return where MoR pays and where it does not: one line for each cost, with its figure and interval.

    Args:
        folder: of `comparison.json` and `ablation.json`.
    """
    path = folder / "comparison.json"
    if not path.exists():
        return _NOT_MEASURED + _so_far(folder / "ablation.json")
    measured = load(path)
    leader = measured.comparison.leader(measured.results)
    ours = measured.at_best(leader) if leader else []
    if leader is None or not ours:
        return _at_smaller(measured, load_moved(folder)) + _so_far(folder / "ablation.json")
    lead = measured.comparison.lead(measured.results, "report")
    budget = measured.comparison.budgets[-1]
    rows = [
        ["compared at", "the better MoR", "best vanilla that costs no more", "causal loss, MoR less vanilla [95%]"],
        [f"training FLOPs, {budget:.2g} each", f"{budget:.3g}", f"{budget:.3g}", with_seeds(lead)],
    ]
    for label, key in COSTS.items():
        if label != "training FLOPs" and (found := measured.against_no_costlier(label)) is not None:
            base, difference = found
            rows.append([label, f"{mean_of(ours, key):.4g}", f"{base[key]:.4g} ({base['group']})", str(difference)])
    text = (
        f"{ours[0]['group']} against vanilla, losses on held-out text that nothing was chosen on:\n\n{markdown(rows)}"
    )
    flops = measured.flops_for_the_loss(leader)
    if flops is not None:
        ratio, band = flops
        text += f"\nVanilla needs {ratio:.2f} [{band.low:.2f}, {band.high:.2f}] times the FLOPs for MoR's loss.\n"
    return text


def _at_smaller(measured: Measured, moved: Moved) -> str:
    """Say what there is while the largest budget is not finished, the largest that is finished first."""
    budgets, parts = measured.comparison.budgets, []
    for index in reversed(range(len(budgets) - 1)):
        table, behind = at_budget(measured, index)
        routed = [less for group, less in behind.items() if group.startswith(("mor", "grown"))]
        if routed:
            verdict = f"{abs(min(routed)):.3f} nats {'behind' if min(routed) > 0 else 'ahead of'} vanilla"
            parts.append(f"At {budgets[index]:.2g} training FLOPs the better MoR is {verdict}:\n\n{table}")
    if not parts:
        return "Not measured yet: no budget is finished.\n"
    tables, done = "\n".join(parts), len(measured.all_done())
    return f"""A first part of the answer ([isoflop](../experiments/isoflop/OUTCOME.md), {done} runs): every family
at its best depth and width of those run (depth chosen and rates swept at the smallest budget), one seed, causal loss
in nats on held-out works that nothing was chosen on. The largest budget, {budgets[-1]:.2g}, and with it seeds and
intervals, is not run.

{tables}{_moved_sentence(moved)}
Names: `l8` layers, `r2` recursions (N_r), `d192` width, `lr` peak rate; *grown* trains one pass of the block first, for
the share of its steps that stands behind N_r. `vanilla-l4` has as many layers as MoR with N_r = 3 has unique ones.
"""


def load_moved(folder: Path) -> Moved:
    """Read what `again.py` wrote, if it is there."""
    path = folder / "again.json"
    return json.loads(path.read_text(encoding="utf-8"))["moved"] if path.exists() else {}


def _moved_sentence(moved: Moved) -> str:
    """Say how far runs moved that were made again."""
    by = {name: halves["report"] for name, halves in moved.items()}
    says = [
        f"{name.split('-')[0]}'s best there moved by {loss['now'] - loss['before']:+.4f}"
        for name, loss in by.items()
        if loss["now"] is not None and loss["before"] is not None
    ]
    if not says:
        return ""
    return f"""
The runs of the smallest budget above summed the embedding's gradient in bfloat16. Made again in float32,
{" and ".join(says)}.
"""


_ABLATED = (
    (("as it is", "as it is"), "base", "base"),
    (("QK-norm", "QK-norm"), "qk-norm", "qk-norm"),
    (("capacities 1, 0.25, 0.125", "as it is"), "lower-capacity", "base"),
    (("one pass for 0.7 of the steps", "as it is"), "growth-0.7", "base"),
)
"""What is told of the ablation: (MoR, vanilla), and their parts."""


def _so_far(path: Path) -> str:
    """Say what the ablation's base says of the two families, for as long as the comparison has no figure."""
    if not path.exists():
        return ""
    values = json.loads(path.read_text(encoding="utf-8"))
    ablation, results = Ablation(values["scale"]), {row["name"]: row for row in values["results"]}
    named = {part.name: part for part in (PLAIN, *PARTS)}

    def runs(family: models.Family, part: str) -> list[SweepRun]:
        return [ablation.at_best(results, family, named[part], seed) for seed in FIRST + FRESH]

    done = {f: [results[run.name] for run in runs(f, "base") if run.name in results] for f in models.FAMILIES}
    if not all(done.values()):
        return ""
    compared = [["MoR", "vanilla", "MoR less vanilla [95%]"]]
    for says, of_mor, of_vanilla in _ABLATED:
        difference = paired(results, runs("mor", of_mor), runs("vanilla", of_vanilla), "report")
        if difference is not None:
            compared.append([*says, with_seeds(difference)])
    head = ["4e15 training FLOPs, Muon", "parameters without embedding", "tokens for each", "serving FLOPs/token"]
    rows = [[*head, "KV bytes/token"]]
    for family, own in done.items():
        first = own[0]
        size, costs = first["non_embedding"], (first["serving_flops_per_token"], first["kv_bytes_per_token"])
        each = f"{first['tokens'] / size:.1f}"
        rows.append([f"{family}, width {first['config']['model']['d_model']}", f"{size / 1e6:.2f}M", each])
        rows[-1] += [f"{costs[0] / 1e6:.1f}M", f"{costs[1]:.0f}"]
    return (
        "\nFrom the [ablation](../experiments/isoflop/ABLATION.md): MoR (expert-choice, three "
        "recursions)\nagainst vanilla in nats, paired seeds, on held-out works that nothing was chosen on; above zero "
        "MoR is behind. Each\nis at the best of three widths and of three rates; the highest rate was best for both, so"
        f" neither is at its best yet.\n\n{markdown(compared)}\n"
        "What MoR gains most by, fewer tokens in late passes and one pass for most of the training, brings it closer "
        "to a plain\nmodel of its unique layers. What pays in each family was not run together.\n\n"
        f"{markdown(rows)}"
    )


def figures(measured: Measured, folder: Path) -> list[Path]:
    """Draw the parabolas of every family, L*(C), and the frontiers, as far as there are runs for them."""
    written, fits = [], measured.fits()
    for family, fit in fits.items():
        points = {
            budget: measured.points(family, index)
            for index, budget in enumerate(measured.comparison.budgets)
            if budget in fit.parabolas
        }
        written += plot_isoflop(folder / f"isoflop-{family}", points, fit, f"{family}, held-out half `report`")
    if any(fit.losses is not None for fit in fits.values()):
        written += plot_losses(folder / "isoflop-losses", {str(family): fit for family, fit in fits.items()})
    if measured.all_done():
        written += plot_frontiers(folder / "isoflop-frontiers", measured.frontiers())
    return written


def main() -> int:
    """Write tables and figures."""
    options = tyro.cli(Arguments, description=__doc__)
    measured = load(options.results)
    for path in figures(measured, options.images):
        print(path)
    body = tables(measured, load_moved(options.results.parent))
    text = f"# What the comparison came to\n\nWritten by `outcome.py`; do not edit.\n\n{body}"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
import tyro
from comparison import Comparison
from measured import COSTS, Measured
from outcome_tables import markdown, mean_of, tables, with_seeds

from mor_jax.sweep.isoflop_plots import plot_frontiers, plot_isoflop, plot_losses

RESULTS = Path(__file__).parent / "results" / "comparison.json"
IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"


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


def first_screen(path: Path = RESULTS) -> str:
    """Return where MoR pays and where it does not: one line for each cost, with its figure and interval."""
    if not path.exists():
        return (
            "Not measured yet. The runs that answer it ([isoflop](../experiments/isoflop/README.md): every family at "
            "its own best\nsize for a budget, whole works held out, paired seeds) are written and have not been run; "
            "until they are, nothing here\nsays that MoR beats the best plain Transformer of its budget, or that it "
            "does not. The tables below are of older\ncomparisons, each with what its baseline cannot say.\n"
        )
    measured = load(path)
    leader = measured.comparison.leader(measured.results)
    ours = measured.at_best(leader) if leader else []
    if leader is None or not ours:
        return "Not measured yet: the runs at the largest budget are not finished.\n"
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
    if fits:
        written += plot_losses(folder / "isoflop-losses", fits)
    if measured.all_done():
        written += plot_frontiers(folder / "isoflop-frontiers", measured.frontiers())
    return written


def main() -> int:
    """Write tables and figures."""
    options = tyro.cli(Arguments, description=__doc__)
    measured = load(options.results)
    for path in figures(measured, options.images):
        print(path)
    text = f"# What the comparison came to\n\nWritten by `outcome.py`; do not edit.\n\n{tables(measured)}"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

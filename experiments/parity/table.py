"""Write the table of docs/parity.md: python experiments/parity/table.py GOLDENS [--execution E] [--documents N...].

Every case of the folder has a row: measured, or the reason why it differs by design. `scan` and packed documents are
only printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mor_jax.config import Execution
from mor_jax.errors import UserError
from mor_jax.interop.parity import TOLERANCES, compare

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "parity.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COLUMNS = tuple(TOLERANCES)
BY_DESIGN = {
    "mor_expert_mc3_untied_attn_884fa5a": "differs by design: refused with the reason (early release, attention not "
    "shared); test_untied_attention_of_the_early_release_is_refused_with_the_reason",
}


def row(name: str, path: Path, execution: Execution, documents: Sequence[int]) -> tuple[str, bool]:
    """One line of the table, and whether it is as it should be."""
    if name in BY_DESIGN:
        return f"| {name} | {BY_DESIGN[name]} |" + " |" * len(COLUMNS), True
    with np.load(path) as file:
        case = {key: file[key] for key in file.files}
    try:
        report = compare(case, execution, documents)
    except UserError as error:
        return f"| {name} | FAILS: {error} |" + " |" * len(COLUMNS), False
    routing = {None: "no router", True: "equal", False: "DIFFERS"}[report.routing_equal]
    cells = [f"{report.errors[c]:.1e}" if c in report.errors else "" for c in COLUMNS]
    return f"| {name} | {routing} | {' | '.join(cells)} |", not report.failures


def main() -> int:
    """Measure every case, print the table and put it into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("goldens", type=Path)
    parser.add_argument("--execution", choices=("gather", "scan"), default="gather")
    parser.add_argument("--documents", type=int, nargs="*", default=(), help="give rows as documents of these lengths")
    options = parser.parse_args()
    header = [
        f"| case ({options.execution}) | routing | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
        f"| tolerance | exact | {' | '.join(f'{TOLERANCES[c]:.0e}' for c in COLUMNS)} |",
    ]
    paths = sorted(p for p in options.goldens.glob("*.npz") if not p.name.startswith("init_"))
    rows = [row(path.stem, path, options.execution, options.documents) for path in paths]
    table = "\n".join([*header, *(line for line, _ in rows)])
    print(table)
    if options.execution == "gather" and not options.documents:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0 if rows and all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

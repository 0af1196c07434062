"""Text for the isoFLOP runs: training text without a single part of a held-out work, and two held-out halves.

    python experiments/isoflop/corpus.py SHARDS... --out data/isoflop-text

Inputs are JSON lines (plain or .xz; files, or folders of them) with `text`, `source` and `id`. A *work* is a book (`id`
before `#`), a textbook (`id` before its last `/`) or, of other sources, a document. A hash of its id and the seed says
whether a work is held out, in which half, and which of its documents are measured: it depends neither on which inputs
are given nor on their order, so shards may be added later. Choices are made on the half `choose`, figures are of
`report`; what is held out, but not measured, is in neither, nor in training.
"""

import hashlib
import json
import lzma
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Part = Literal["train", "choose", "report", "dropped"]
HELD_OUT = {
    "books": (0.03, 0.25),
    "openstax": (0.12, 0.1),
    "wiki": (0.004, 1.0),
    "wiki_tail": (0.008, 1.0),
    "techdocs": (0.04, 1.0),
    "usgov": (0.04, 1.0),
    "stories": (0.08, 1.0),
}
"""By source: share of its works that is held out, half for each half, and share of their documents that is measured (a
textbook is megabytes; the loss of a tenth of its pages says as much)."""
_OTHERS = (0.01, 1.0)
SEED = 2
"""Of 0 to 5 the one whose halves are most alike: two textbooks each, 12 and 14 books, 2.2 and 2.4 MB."""


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON lines, plain or .xz, or folders of them."""
    out: Path
    """Folder for train/, choose.jsonl and report.jsonl."""
    workers: int = 2
    """Processes; an input is the work of one."""


def work_of(document: dict[str, Any]) -> str:
    """Return what a document is a part of."""
    identity = document["id"]
    if document["source"] == "books":
        return identity.split("#")[0]
    return identity.rsplit("/", 1)[0] if document["source"] == "openstax" else identity


def part_of(document: dict[str, Any], seed: int = SEED) -> Part:
    """Return where a document goes."""
    held_out, measured = HELD_OUT.get(document["source"], _OTHERS)
    place = _place(work_of(document), seed)
    if place >= held_out:
        return "train"
    if _place(f"measured {document['id']}", seed) >= measured:
        return "dropped"
    return "choose" if place < held_out / 2 else "report"


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that a name has."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) / 2**64


def split(path: Path, out: Path) -> dict[tuple[Part, str], list[int]]:
    """Divide one file into ``out/train`` and the halves in ``out/parts``; return (documents, bytes) by part, source."""
    name = path.name.removesuffix(".xz").removesuffix(".jsonl") + ".jsonl"
    counts: dict[tuple[Part, str], list[int]] = defaultdict(lambda: [0, 0])
    targets = {half: out / "parts" / f"{half}-{name}" for half in ("choose", "report")}
    targets["train"] = out / "train" / name
    files = {part: target.with_suffix(".part").open("wb") for part, target in targets.items()}
    for line in _lines(path):
        document = json.loads(line)
        part = part_of(document)
        count = counts[part, document["source"]]
        count[0] += 1
        count[1] += len(document["text"].encode())
        if part in files:
            files[part].write(line)
    for part, target in targets.items():
        files[part].close()
        target.with_suffix(".part").rename(target)
    return dict(counts)


def _lines(path: Path) -> Iterator[bytes]:
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        yield from file


def main() -> int:
    """Divide the inputs, join the halves, and say what came out."""
    options = tyro.cli(Arguments, description=__doc__)
    paths = sorted(file for path in options.inputs for file in (path.glob("*.jsonl*") if path.is_dir() else [path]))
    names = [path.name for path in paths]
    if not paths or len(set(names)) < len(names):
        raise SystemExit(f"{', '.join(map(str, options.inputs))}: no JSON lines, or two of one name")
    for folder in ("train", "parts"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(split, paths, [options.out] * len(paths)))
    for half in ("choose", "report"):
        parts = sorted((options.out / "parts").glob(f"{half}-*.jsonl"))
        (options.out / f"{half}.jsonl").write_bytes(b"".join(part.read_bytes() for part in parts))
    totals: dict[tuple[Part, str], list[int]] = defaultdict(lambda: [0, 0])
    for counts in found:
        for key, (documents, size) in counts.items():
            totals[key] = [totals[key][0] + documents, totals[key][1] + size]
    print(f"{'part':8s} {'source':10s} {'documents':>10s} {'bytes':>12s}")
    for (part, source), (documents, size) in sorted(totals.items()):
        print(f"{part:8s} {source:10s} {documents:10d} {size:12d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

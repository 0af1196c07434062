"""Is another commit as fast? Times two source trees in turn (A/B/A/B) on this device; gives ratios of medians.

Usage: git worktree add ../before COMMIT, then
    python experiments/throughput/old_and_new.py --old ../before/src --new src --out FILE
        --train "vanilla-360m mor-360m-expert-r3 --steps 15" --serve "vanilla-360m@34 mor-360m-expert-r4"

Each tree compiles into a cache of its own first, both at the same time; then they are timed alone, from those programs.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import tyro

Figures = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    old: Path
    """Source tree of the commit before: the folder that holds mor_jax/."""
    new: Path
    """Source tree of the commit after."""
    out: Path
    """JSON file."""
    train: str = ""
    """Arguments of `mor bench train`; empty times none."""
    serve: str = ""
    """Arguments of `mor bench serve`; empty times none."""
    rounds: int = 2
    """Runs of each tree, in turn."""


def start(tree: Path, target: str, arguments: Sequence[str], cache: Path, out: Path) -> subprocess.Popen[str]:
    """Start one benchmark of one tree, its compiled programs in ``cache``."""
    path = os.pathsep.join((str(tree.resolve()), os.environ.get("PYTHONPATH", "")))
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "mor_jax.cli", "bench", target, *arguments, "--out", str(out)]
    if target == "train":
        command += ["--cache", str(cache)]
    # two of them share the device while they compile
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} | os.environ | cached | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    """Wait for a benchmark and return its record."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a benchmark failed:\n{said[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def figures(target: str, record: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of every case or scenario."""
    if target == "train":
        return {case["name"]: case["tokens_per_second"] for case in record["cases"]}
    names = (f"{r['model']}, {r['match']} {r['batch']}" for r in record["results"])
    return dict(zip(names, (r["tokens_per_second"] for r in record["results"]), strict=True))


def facts(target: str, record: dict[str, Any]) -> dict[str, Any]:
    """Device and versions."""
    source = record["cases"][0] if target == "train" else record
    return {key: source[key] for key in ("device", "versions")}


def compare(target: str, arguments: Sequence[str], settings: Settings, folder: Path) -> dict[str, Any]:
    """Time both trees in turn."""
    trees = {"old": settings.old, "new": settings.new}
    caches = {name: folder / f"cache-{name}" for name in trees}
    first = {
        name: (start(tree, target, arguments, caches[name], out := folder / f"{name}.json"), out)
        for name, tree in trees.items()
    }
    for process, out in first.values():
        finish(process, out)
    found: dict[str, Figures] = {name: defaultdict(list) for name in trees}
    about: dict[str, Any] = {}
    for _ in range(settings.rounds):
        for name, tree in trees.items():
            out = folder / f"{name}.json"
            record = finish(start(tree, target, arguments, caches[name], out), out)
            about = facts(target, record)
            for case, value in figures(target, record).items():
                found[name][case].append(value)
            print(target, name, json.dumps(figures(target, record)), flush=True)
    ratios = {case: median(found["new"][case]) / median(values) for case, values in found["old"].items()}
    return {"arguments": list(arguments), **about, "tokens_per_second": found, "new_over_old": ratios}


def main(settings: Settings) -> None:
    """Time what is asked for and write the record after each part."""
    record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "rounds": settings.rounds}
    for target in ("train", "serve"):
        arguments = getattr(settings, target).split()
        if arguments:
            with tempfile.TemporaryDirectory() as folder:
                record[target] = compare(target, arguments, settings, Path(folder))
            print(json.dumps(record[target]["new_over_old"], indent=1), flush=True)
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))

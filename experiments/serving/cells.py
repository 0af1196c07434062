"""Tokens per second and waiting times at fixed numbers of sequences in flight, for source trees in turn.

    python experiments/serving/cells.py before=OLD/src now=src --models vanilla-360m mor-360m-expert-r3 \
      --groups 32,256 8,1 --out FILE
    python experiments/serving/cells.py --out FILE          # prints the table of a file once more

A cell is a model and so many sequences (`32:int8` keeps keys and values in int8): so many requests run, and an eighth
more wait; each that ends is followed by the next. Prompts are 64 random tokens, completions 256 +- 64, drawn at
temperature 100; weights are random. Every pair of tree and model is a process of its own (`cells_worker.py`), all on
the one device. A group of sizes is compiled, some processes at the same time; then, while nothing compiles, its cells
are timed one after the other, the trees in turn, in the other order in the second round. The file is whole after every
cell.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Size = tuple[int, str]
_MARGIN = 6.0
"""Seconds that a cell may take beyond those measured: ramp and cancelling."""
_COMPILING = 0.5
"""Share of the time left after which a group compiles nothing more, and what is ready is timed."""
_SHOWN = {"first_token_ms": ("p50", "p99"), "per_token_ms": ("p50", "p99"), "between_tokens_ms": ("p99",)}
"""Columns of the table; the median between two tokens is 0, as a dispatch hands out several of a sequence at once."""


class Worker:
    """A process that holds one model's engines of one tree."""

    def __init__(self, tree: str, source: Path, model: str) -> None:
        self.tree, self.model = tree, model
        paths = [str(source.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cells_worker.py")), model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.ready: set[Size] = set()

    def read(self) -> dict[str, Any]:
        """Wait for a line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.tree} {self.model} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, which reading says
        return self.read()


def compile_group(workers: list[Worker], sizes: list[Size], until: float, say: Any) -> None:
    """Let all compile, a size at a time: the first model's trees one after the other, then the rest together.

    XLA chooses among kernels by timing them, and remembers what it chose (in the compilation cache's folder): so most
    choices are made once, by a process that has the device for itself, and all trees and models have the same ones.
    """
    first = [worker for worker in workers if worker.model == workers[0].model]
    waves = [[worker] for worker in first] + [[worker for worker in workers if worker not in first]]
    done = {(id(worker), size): threading.Event() for worker in workers for size in sizes}

    def compile_size(worker: Worker, size: Size) -> None:
        if time.monotonic() > until:
            say(f"{worker.tree} {worker.model} {name(size)}: no time to compile it")
            return
        found = worker.ask({"compile": size})
        worker.ready.add(size)
        say(f"{worker.tree} {worker.model} {name(size)}: warm after {found['warm_up_seconds']:.1f} s")

    def run(worker: Worker, before: list[Worker]) -> None:
        for size in sizes:
            for other in before:
                done[id(other), size].wait()
            try:
                compile_size(worker, size)
            except Exception as error:  # of this size alone: others wait for its end, and have theirs
                say(f"{worker.tree} {worker.model} {name(size)}: {error!r}")
            finally:
                done[id(worker), size].set()

    with ThreadPoolExecutor(len(workers)) as pool:
        for before, wave in itertools.pairwise([[], *waves]):
            for worker in wave:
                pool.submit(run, worker, before)


def in_turn(workers: list[Worker], sizes: list[Size], rounds: int) -> Iterator[tuple[int, Size, Worker]]:
    """Order the timings of a group."""
    models = list(dict.fromkeys(worker.model for worker in workers))
    for nth, size, model in itertools.product(range(rounds), sizes, models):
        trees = [worker for worker in workers if worker.model == model]
        for worker in trees[:: -1 if nth % 2 else 1]:
            yield nth, size, worker


def run(arguments: argparse.Namespace) -> None:
    """Compile and time group after group until the time is over."""
    began = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - began:6.1f}] {text}", flush=True)  # noqa: E731
    trees = dict(tree.split("=", 1) for tree in arguments.trees)
    workers = [Worker(tree, Path(trees[tree]), model) for model in arguments.models for tree in trees]
    settings = {key: value for key, value in vars(arguments).items() if key not in ("trees", "out")}
    record: dict[str, Any] = {"trees": list(trees), "settings": settings, "results": []}

    def stop() -> None:
        for worker in workers:
            worker.process.kill()

    watchdog = threading.Timer(arguments.deadline, stop)
    watchdog.start()
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            for found in pool.map(Worker.read, workers):
                record.update(found)
        say(f"{len(workers)} models on {record['device']}")
        for group in arguments.groups:
            sizes = [parse_size(text) for text in group.split(",")]
            now = time.monotonic()
            compile_group(workers, sizes, now + _COMPILING * (began + arguments.deadline - now), say)
            for nth, size, worker in in_turn(workers, sizes, arguments.rounds):
                if time.monotonic() - began > arguments.deadline - arguments.seconds - _MARGIN:
                    say("the time is over")
                    return
                if size not in worker.ready:
                    continue
                try:
                    found = worker.ask({"time": size, "seconds": arguments.seconds})
                except EOFError as error:
                    say(str(error))
                    worker.ready.clear()
                    continue
                cell = {"model": worker.model, "sequences": name(size), "tree": worker.tree, "round": nth}
                record["results"].append({**cell, **found})
                arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                say(f"{worker.tree} {worker.model} {name(size)}: {found['tokens_per_second']:.0f} tokens/s")
    except EOFError as error:
        say(str(error))
    finally:
        watchdog.cancel()
        stop()


def parse_size(text: str) -> Size:
    """Read ``32`` or ``32:int8``."""
    running, _, kind = text.partition(":")
    return int(running), kind or "model"


def name(size: Size) -> str:
    """The reverse of ``parse_size``."""
    return str(size[0]) if size[1] == "model" else f"{size[0]}:{size[1]}"


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per cell, medians over the rounds; the last tree's tokens/s are also over the first's."""
    trees = list(dict.fromkeys(result["tree"] for result in record["results"]))
    cells = sorted(
        dict.fromkeys((result["model"], result["sequences"]) for result in record["results"]),
        key=lambda cell: (cell[0].startswith("mor"), cell[0], parse_size(cell[1])[1] == "int8", parse_size(cell[1])),
    )
    heads = [f"tokens/s, {tree}" for tree in trees] + [f"{trees[-1]} over {trees[0]}"] * (len(trees) > 1)
    title = lambda key: f"{key.removesuffix('_ms').replace('_', ' ')}, ms, {' / '.join(_SHOWN[key])}"  # noqa: E731
    heads += [f"{title(key)}, {tree}" for key in _SHOWN for tree in trees]
    lines = ["| model | sequences | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for model, sequences in cells:
        found = {
            tree: [
                result
                for result in record["results"]
                if (result["model"], result["sequences"], result["tree"]) == (model, sequences, tree)
            ]
            for tree in trees
        }
        rates = {tree: [result["tokens_per_second"] for result in results] for tree, results in found.items()}
        row = [f"{statistics.median(rate):,.0f}" if rate else "" for rate in rates.values()]
        if len(trees) > 1:
            old, new = rates[trees[0]], rates[trees[-1]]
            row.append(f"{statistics.median(new) / statistics.median(old):.2f}" if old and new else "")
        row += [_percentiles(found[tree], key) for key in _SHOWN for tree in trees]
        lines.append(f"| {model} | {sequences} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _percentiles(results: list[dict[str, Any]], key: str) -> str:
    known = [result[key] for result in results if key in result]
    medians = [statistics.median(times[p] for times in known) for p in _SHOWN[key]] if known else []
    return " / ".join(f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in medians)


def main() -> int:
    """Measure, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="LABEL=SRC", help="source trees; none only prints the table")
    parser.add_argument("--models", nargs="+", default=["vanilla-360m", "mor-360m-expert-r3", "mor-360m-expert-r4"])
    parser.add_argument("--groups", nargs="+", default=["32,256", "8,1"], help="sizes that are compiled together")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured of each cell in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.trees:
        run(arguments)
    if not arguments.out.exists():
        raise SystemExit(f"{arguments.out}: no cell was timed")
    print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

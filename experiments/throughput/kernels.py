"""Pieces of a training step before and after their GPU kernel, in one run: medians, JSON.

Usage: python experiments/throughput/kernels.py --out FILE [--cases skip_norm projection ...] [--tune]
Shapes are those of the 360M model on 16 rows of 2048 tokens in bfloat16, and of its second recursion (1368 slots).
``kernel_cases.CASES`` names the pieces, each a function of the shape that returns the variants, oldest first.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import tyro
from kernel_cases import CASES, TUNABLE, Shape

from mor_jax.errors import UserError, require
from mor_jax.plan.report import versions

_WARMUP = 3


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often."""

    out: Path
    """JSON file for the results."""
    cases: tuple[str, ...] = ()
    """Names of pieces; all if none is given."""
    repeats: int = 30
    """Timed batches per variant."""
    calls: int = 20
    """Calls per batch, dispatched one behind the other, so that Python's share is hidden."""
    tune: bool = False
    """Whether to try other sizes of the programs of ``TUNABLE``, too."""

    def __post_init__(self) -> None:
        for name in ("repeats", "calls"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in self.cases:
            require(name in CASES, f"cases: {name!r} is none of {', '.join(CASES)}")


def timed(function: Callable[..., Any], arguments: tuple[Any, ...], settings: Settings) -> dict[str, float]:
    """Milliseconds per call, compiled: median over the batches, and their spread over it."""
    run = jax.jit(function)
    for _ in range(_WARMUP):
        jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(settings.repeats):
        began, out = time.perf_counter(), None
        for _ in range(settings.calls):
            out = run(*arguments)
        jax.block_until_ready(out)
        found.append(1e3 * (time.perf_counter() - began) / settings.calls)
    median = statistics.median(found)
    return {"ms": median, "spread": (max(found) - min(found)) / median}


def measure(name: str, shape: Shape, settings: Settings) -> dict[str, Any]:
    """Time every variant of a piece."""
    case = CASES[name](shape)
    results: dict[str, Any] = {}
    for variant, function in case.variants.items():
        results[variant] = timed(function, case.arguments, settings)
        if case.least_bytes is not None:
            results[variant]["gb_per_second"] = case.least_bytes / results[variant]["ms"] / 1e6
    first = next(iter(results.values()))["ms"]
    return {"case": name, "variants": {v: r | {"times_faster": first / r["ms"]} for v, r in results.items()}}


def tuned(name: str, shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """Time a piece's last variant with every choice of its constants, the fastest first."""
    module, choices = TUNABLE[name]
    found = []
    for constants in _chosen(module, choices):
        case = CASES[name](shape)
        *_, function = case.variants.values()
        found.append({"constants": constants, **timed(function, case.arguments, settings)})
    return sorted(found, key=lambda result: result["ms"])


def _chosen(module: ModuleType, choices: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Set a module's constants to every choice in turn, and back at the end."""
    before = {name: getattr(module, name) for name in choices}
    try:
        for values in itertools.product(*choices.values()):
            constants = dict(zip(choices, values, strict=True))
            for name, value in constants.items():
                setattr(module, name, value)
            jax.clear_caches()  # kernels read them when they are traced
            yield constants
    finally:
        for name, value in before.items():
            setattr(module, name, value)
        jax.clear_caches()


def run(settings: Settings, shape: Shape) -> dict[str, Any]:
    """Time the pieces one after the other, and write the record after each."""
    device = jax.local_devices()[0]
    results: list[dict[str, Any]] = []
    record = {
        "command": sys.argv,
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "shape": dataclasses.asdict(shape),
        "device": device.device_kind,
        "platform": device.platform,
        "versions": versions(),
        "results": results,
    }
    for name in settings.cases or tuple(CASES):
        result = measure(name, shape, settings)
        if settings.tune and name in TUNABLE:
            result["tuned"] = tuned(name, shape, settings)
        results.append(result)
        settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for variant, found in result["variants"].items():
            print(f"{name:24} {variant:10} {found['ms']:8.4f} ms  {found['times_faster']:.2f} times faster", flush=True)
        if "tuned" in result:
            best = result["tuned"][0]
            print(f"{name:24} {'tuned':10} {best['ms']:8.4f} ms  {best['constants']}", flush=True)
    return record


def main() -> None:
    """Run, print and write JSON; exit with code 2 where there is no GPU."""
    settings = tyro.cli(Settings, description=__doc__)
    try:
        require(jax.default_backend() == "gpu", f"device={jax.local_devices()[0].device_kind!r} is no GPU")
        settings.out.parent.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        raise SystemExit(_refused(error)) from None
    run(settings, Shape())


def _refused(error: Exception) -> int:
    print(f"kernels.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()

"""Which tiles and sizes make the decode kernels fastest on the present GPU?

Usage: python experiments/serving/tune.py --out FOLDER. Writes tiles.json (products), attention.json, head.json and
tuning.json (device, versions, command, the fastest of each). Times are those of the kernels alone, from a trace. Every
call reads other weights or pages than the one before, more of them in all than the card's caches hold.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tune_runs import AttentionRun, HeadRun, ProductRun, products, tiles

from mor_jax import presets
from mor_jax.bench.serving_profile import trace_kernels
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError, require
from mor_jax.infer.head_kernel import HeadTile, head_tile_for
from mor_jax.infer.product_kernel import MAX_ROWS
from mor_jax.kernels.decode_attention import Reads

Row = dict[str, Any]
Run = Callable[[], Any]
_READS = ((64, 4, 3), (64, 4, 1), (128, 4, 2), (128, 8, 2), (128, 4, 3), (32, 4, 3), (64, 2, 3), (256, 8, 1))
"""Entries, warps and stages of the attention."""
_HEADS = ((64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3),
          (256, 64, 8, 2), (256, 64, 8, 3))  # fmt: skip
"""Vocabulary entries, depth, warps and stages of the head."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """Folder for the JSON files."""
    preset: str = "vanilla-360m"
    """Whose shapes."""
    rows: tuple[int, ...] = (32, 82)
    """Single tokens that are decoded at a time."""
    held: int = 256
    """Attention: entries of a row on average; they are spread evenly from 1 on."""
    page_size: int = 16
    """Cache entries per page."""
    cold_mib: int = 128
    """Bytes of different weights or pages that the calls read in turn: more than twice the card's cache."""
    repeats: int = 3
    """Rounds over them, all timed."""
    processors: int | None = None
    """Multiprocessors of the card; None asks it."""

    def __post_init__(self) -> None:
        for name in ("held", "page_size", "cold_mib", "repeats"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        sound = all(0 < rows <= MAX_ROWS for rows in self.rows)
        require(bool(self.rows) and sound, f"rows={self.rows} must be from 1 to {MAX_ROWS}, where kernels are used")


def kernel_microseconds(run: Run, name: str, repeats: int) -> list[float]:
    """Time the kernels whose name begins with ``name``, after one round to compile and warm up."""
    jax.block_until_ready(run())

    def rounds() -> None:
        for _ in range(repeats):
            jax.block_until_ready(run())

    found = [seconds * 1e6 for kernel, _, seconds in trace_kernels(rounds) if kernel.startswith(name)]
    if not found:
        raise RuntimeError(f"the trace shows no kernel named {name}")
    return found


def timed(run: Run, name: str, repeats: int) -> Row:
    """Return median and minimum in microseconds, or why there are none: some sizes exceed the card's shared memory."""
    try:
        found = kernel_microseconds(run, name, repeats)
    except jax.errors.JaxRuntimeError as error:
        return {"microseconds": None, "fastest": None, "error": str(error).partition("\n")[0][:200]}
    return {"microseconds": float(np.median(found)), "fastest": min(found)}


def copies_for(size: int, settings: Settings) -> int:
    """Return how many arrays of ``size`` bytes the calls take in turn."""
    return max(2, math.ceil(settings.cold_mib * 2**20 / size))


def measure_tiles(config: ModelConfig, settings: Settings, processors: int) -> Iterator[Row]:
    """Yield the rows of tiles.json."""
    names = {"gate_up": "product_gated", "qkv": "product_norm"}
    itemsize = jnp.dtype(config.dtype).itemsize
    for rows in settings.rows:
        for case in products(config):
            run = ProductRun(case, rows, copies_for(math.prod(case.shape) * itemsize, settings), config.dtype)
            for nth, tile in enumerate(tiles(case, rows, processors, itemsize)):
                head = {"rows": rows, "kind": case.kind, "tile": dataclasses.asdict(tile), "default": nth == 0}
                name = names.get(case.kind, "product_residual")
                yield head | timed(functools.partial(run, tile), name, settings.repeats)


def measure_attention(config: ModelConfig, settings: Settings) -> Iterator[Row]:
    """Yield the rows of attention.json."""
    entry = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    for rows in settings.rows:
        run = AttentionRun(
            config, rows, settings.held, settings.page_size, copies_for(rows * settings.held * entry, settings)
        )
        for sizes in _READS:
            found = timed(functools.partial(run, Reads(*sizes)), "decode_attention", settings.repeats)
            yield {"rows": rows, "version": "new", "entries_warps_stages": list(sizes), **found}


def measure_head(config: ModelConfig, settings: Settings) -> Iterator[Row]:
    """Yield the rows of head.json; the combination of the tiles is not in its times."""
    itemsize = jnp.dtype(config.dtype).itemsize
    for rows in settings.rows:
        run = HeadRun(config, rows, copies_for(config.vocab_size * config.d_model * itemsize, settings))
        default = head_tile_for(rows, itemsize)
        for tile in dict.fromkeys((default, *(HeadTile(*sizes) for sizes in _HEADS))):
            head = {"rows": rows, "kind": "head", "tile": dataclasses.asdict(tile), "default": tile == default}
            yield head | timed(functools.partial(run, tile), "sample_head", settings.repeats)


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Return the row with the smallest median of each kind and number of rows, in their order."""
    best: dict[Any, Row] = {}
    for row in rows:
        key = (row["rows"], row.get("kind"))
        if row["microseconds"] is not None and (key not in best or row["microseconds"] < best[key]["microseconds"]):
            best[key] = row
    return list(best.values())


def tune(settings: Settings) -> dict[str, Any]:
    """Measure everything and write the files, each as soon as it is whole.

    Raises:
        UserError: there is no GPU, or no such preset.
    """
    config, device = presets.get(settings.preset).config.model, jax.local_devices()[0]
    require(device.platform == "gpu", f"kernels can be measured on a GPU alone, not on device={device.platform!r}")
    processors = settings.processors or getattr(device, "core_count", 0)
    require(processors > 0, "the device does not say how many multiprocessors it has: set --processors")
    settings.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "command": sys.argv,
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "device": device.device_kind,
        "processors": processors,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    }
    measured = {
        "tiles": measure_tiles(config, settings, processors),
        "attention": measure_attention(config, settings),
        "head": measure_head(config, settings),
    }
    for name, found in measured.items():
        rows = list(found)
        record[f"fastest_{name}"] = fastest(rows)
        for file, content in ((name, rows), ("tuning", record)):
            (settings.out / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for row in record[f"fastest_{name}"]:
            print(json.dumps(row), file=sys.stderr)
    return record


def main() -> int:
    """Run; 2 where there is nothing to measure on."""
    try:
        tune(tyro.cli(Settings, description=__doc__))
    except UserError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

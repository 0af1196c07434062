"""What head and loss take on the present GPU, forward and gradient: XLA's softmax against the Triton kernel.

    python experiments/throughput/loss_kernel.py --out FILE.json
    python experiments/throughput/loss_kernel.py --out FILE.json --tiles    # also the kernel alone, at other sizes

Every program is timed in turn, round after round, and compared with XLA's at the first chunk size. With `--tiles` the
kernel of a chunk is timed alone, from a trace, beside what XLA makes of the same; then head and loss are timed with the
fastest size too.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mor_jax import presets
from mor_jax.bench.serving_profile import trace_kernels
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError, require
from mor_jax.kernels import cross_entropy
from mor_jax.kernels.cross_entropy import RowTile, VocabularyShard, plain_gradient
from mor_jax.model.loss import fused_cross_entropy
from mor_jax.plan.report import versions

Row = dict[str, Any]
TILES = tuple(
    RowTile(columns, warps)
    for columns, warps in ((2048, 8), (2048, 16), (2048, 32), (4096, 4), (4096, 8), (4096, 16), (4096, 32), (8192, 8),
                           (8192, 16), (8192, 32), (16384, 16), (16384, 32))
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """The JSON file."""
    preset: str = "vanilla-360m"
    """Whose vocabulary, width and dtype."""
    rows: int = 16
    """Rows of the batch."""
    length: int = 2048
    """Tokens of a row."""
    chunks: tuple[int, ...] = (4096, 8192)
    """Tokens of a chunk, over all rows."""
    repeats: int = 10
    """Rounds of five calls, all timed."""
    tiles: bool = False
    """Also time the kernel alone."""

    def __post_init__(self) -> None:
        for name in ("rows", "length", "repeats"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        sound = bool(self.chunks) and all(chunk > 0 and chunk % self.rows == 0 for chunk in self.chunks)
        require(sound, f"chunks={self.chunks} must be positive multiples of rows={self.rows}")


def make_arguments(config: ModelConfig, settings: Settings) -> tuple[jax.Array, ...]:
    """Hidden states, head, targets and weights: random, every tenth target of no weight."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (settings.rows, settings.length)
    hidden_BTD = jax.random.normal(keys[0], (*shape, config.d_model), jnp.dtype(config.dtype))
    head_VD = jax.random.normal(keys[1], (config.vocab_size, config.d_model)) / math.sqrt(config.d_model)
    weights_BT = (jnp.arange(math.prod(shape)).reshape(shape) % 10 != 0).astype(jnp.float32)
    return hidden_BTD, head_VD, jax.random.randint(keys[2], shape, 0, config.vocab_size), weights_BT


def compile_loss(arguments: tuple[jax.Array, ...], chunk: int, tile: RowTile | None) -> Callable[..., Any]:
    """Compile value and gradients of the mean loss; ``tile`` None is XLA's softmax."""

    def mean(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        entropy = fused_cross_entropy(
            hidden_BTD,
            head_VD,
            targets_BT,
            weights_BT,
            chunk=chunk,
            logits_dtype=hidden_BTD.dtype,
            fused=tile is not None,
        )
        return entropy.loss_sum / jnp.sum(weights_BT)

    usual, cross_entropy.TILE = cross_entropy.TILE, tile or cross_entropy.TILE
    jax.clear_caches()  # nothing that was traced with another tile
    try:
        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).lower(*arguments).compile()
    finally:
        cross_entropy.TILE = usual


def differences(found: Any, wanted: Any) -> Row:
    """Relative difference of the value, and relative norm of the difference of either gradient."""

    def norm(x: jax.Array) -> float:
        return float(jnp.linalg.norm(x.astype(jnp.float32)))

    pairs = zip(found[1], wanted[1], strict=True)
    hidden, head = (norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b) for a, b in pairs)
    return {"value": abs(float(found[0] / wanted[0]) - 1), "grad_hidden": hidden, "grad_head": head}


def measure_loss(config: ModelConfig, settings: Settings, tiles: tuple[RowTile, ...]) -> list[Row]:
    """Time head and loss of a batch with XLA's softmax and with the kernel, at every chunk size."""
    arguments = make_arguments(config, settings)
    cases, programs, wanted = [], [], None
    for chunk in settings.chunks:
        for tile in (None, *tiles):
            program = compile_loss(arguments, chunk // settings.rows, tile)
            result = jax.block_until_ready(program(*arguments))
            wanted = result if wanted is None else wanted
            about = {"fusion": "triton", "tile": dataclasses.asdict(tile)} if tile else {"fusion": "xla"}
            cases.append({"chunk_tokens": chunk, **about, "difference": differences(result, wanted)})
            programs.append(program)
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(settings.repeats):
        for program, found in zip(programs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready([program(*arguments) for _ in range(5)][-1])
            found.append((time.perf_counter() - begin) / 5 * 1e3)
    return [
        case | {"milliseconds": float(np.median(found)), "fastest": min(found), "slowest": max(found)}
        for case, found in zip(cases, times, strict=True)
    ]


def kernel_microseconds(run: Callable[[], Any], name: str, repeats: int) -> float:
    """Device time of one run in the kernels whose name begins with ``name``: the mean, after a run to warm up."""
    jax.block_until_ready(run())

    def rounds() -> None:
        for _ in range(repeats):
            jax.block_until_ready(run())

    found = [seconds for kernel, _, seconds in trace_kernels(rounds) if kernel.startswith(name)]
    if not found:
        raise RuntimeError(f"the trace shows no kernel named {name!r}")
    return sum(found) / repeats * 1e6


def measure_tiles(config: ModelConfig, settings: Settings) -> Iterator[Row]:
    """Time softmax and gradient of the logits of one chunk, alone; XLA's first."""
    tokens, dtype = settings.chunks[0], jnp.dtype(config.dtype)
    logits_MV = 3 * jax.random.normal(jax.random.key(1), (tokens, config.vocab_size), dtype)
    rest = jnp.arange(tokens) % config.vocab_size, jnp.ones((tokens,), jnp.float32)
    least = 2 * logits_MV.size * dtype.itemsize

    def plain(logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array) -> Any:
        shard = VocabularyShard(config.vocab_size)
        return plain_gradient(logits_MV[None], targets_M[None], weights_M[None], shard, dtype, 0.0)

    for tile in (None, *TILES):
        head = {"tile": dataclasses.asdict(tile) if tile else None, "default": tile == cross_entropy.TILE}
        try:
            if tile is None:
                program = jax.jit(plain)
            else:
                options = {"dtype": dtype, "z_coefficient": 0.0, "tile": tile}
                program = jax.jit(functools.partial(cross_entropy.softmax_cross_entropy, **options))
            run, name = lambda program=program: program(logits_MV, *rest), "mor_cross_entropy" if tile else ""
            found = kernel_microseconds(run, name, settings.repeats)
        except jax.errors.JaxRuntimeError as error:
            yield head | {"microseconds": None, "error": str(error).partition("\n")[0][:200]}
        else:
            yield head | {"microseconds": found, "gigabytes_per_second_of_one_read_one_write": least / found / 1e3}


def measure(settings: Settings) -> Row:
    """Measure and write the file, first what the kernel takes alone.

    Raises:
        UserError: there is no GPU, or no such preset.
    """
    config, device = presets.get(settings.preset).config.model, jax.local_devices()[0]
    require(device.platform == "gpu", f"the kernel can be timed on a GPU alone, not on device={device.platform!r}")
    record: Row = {
        "command": ["python", *sys.argv],
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "device": device.device_kind,
        "versions": versions(),
    }
    tiles = (cross_entropy.TILE,)
    if settings.tiles:
        record["tiles"] = _shown(measure_tiles(config, settings))
        timed = [row for row in record["tiles"] if row["tile"] and row["microseconds"] is not None]
        if timed:
            best = min(timed, key=lambda row: row["microseconds"])
            tiles = tuple(dict.fromkeys((cross_entropy.TILE, RowTile(**best["tile"]))))
        settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["loss"] = _shown(measure_loss(config, settings, tiles))
    settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _shown(rows: Any) -> list[Row]:
    """Print rows as they come."""
    found = []
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
        found.append(row)
    return found


def main() -> int:
    """Run; 2 where there is nothing to measure on."""
    try:
        measure(tyro.cli(Settings, description=__doc__))
    except UserError as error:
        print(f"loss_kernel: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

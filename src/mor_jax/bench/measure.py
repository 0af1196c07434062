"""Time one case in this process: the train step that ``mor train`` runs, on random tokens (B rows, T positions).

Run as ``python -m mor_jax.bench.measure REQUEST.json RESULT.json`` by ``bench.run``, so that every case has the device,
its memory and its compile time to itself.
"""

import dataclasses
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.bench.profile import DUMP, profile_step
from mor_jax.config import Config, DistributedConfig, ModelConfig
from mor_jax.config.io import from_dict, to_dict
from mor_jax.errors import require
from mor_jax.mesh.devices import peak_flops
from mor_jax.mesh.mesh import local_rows, make_mesh, shard_batch
from mor_jax.mesh.processes import initialize
from mor_jax.model.flops import count_parameters, train_flops
from mor_jax.model.routing.capacity import routed_tokens, token_seats
from mor_jax.perf import resolve_perf
from mor_jax.plan.clock_kernels import dump_into
from mor_jax.plan.collectives import bytes_by_kind, collectives
from mor_jax.plan.hlo import parse
from mor_jax.runs.state import init_train_state
from mor_jax.train.step import compile_train_step
from mor_jax.versions import installed_versions

_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "nvidia-cudnn-cu13")
_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure."""

    name: str
    config: Config
    """Its batch is that of one device."""
    steps: int
    warmup: int
    packed: bool
    """Documents of random lengths instead of one per row."""
    devices: int
    """Devices of the mesh, of all processes; 0 takes all."""
    profile: str
    """Folder for a trace; empty is none."""


def random_batch(model: ModelConfig, rows: int, *, packed: bool, seed: int) -> dict[str, np.ndarray]:
    """Rows of random tokens, int32 [rows, T+1]: one document each, or packed ones of 512 tokens on average."""
    rng = np.random.default_rng(seed)
    shape = (rows, model.context_length + 1)
    tokens = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
    starts = np.zeros(shape, bool)
    if packed:
        starts = rng.random(shape) < 1 / 512
    starts[:, 0] = True
    columns = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return {
        "tokens": tokens,
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": (columns - first).astype(np.int32),
    }


def tokens_per_recursion(model: ModelConfig) -> list[int]:
    """k of every recursion."""
    if model.routing.kind == "none":
        return [model.context_length] * model.recursion.num_recursions
    seats = token_seats if model.routing.kind == "token" else routed_tokens
    return list(seats(model, model.context_length))


def measure(request: Request) -> dict[str, Any]:
    """Compile, warm up, time, and describe one case; everything in SI units, per step of the whole batch.

    Every process of a run calls this, with a profile's folder of its own.

    Raises:
        UserError: there are not so many devices.
    """
    devices = jax.devices()[: request.devices or None]
    require(request.devices in (0, len(devices)), f"devices={request.devices}, but there are {len(devices)}")
    train = request.config.train
    train = dataclasses.replace(train, batch_size=train.batch_size * len(devices))
    config = dataclasses.replace(request.config, train=train)
    mesh = make_mesh(config.mesh, devices)
    config = dataclasses.replace(config, perf=resolve_perf(config, mesh).asked)
    start = time.perf_counter()
    step = compile_train_step(config, mesh)
    compile_seconds = time.perf_counter() - start
    state = init_train_state(config, mesh)
    rows = config.train.batch_size
    local = local_rows(mesh, rows)
    wholes = [random_batch(config.model, rows, packed=request.packed, seed=s) for s in range(_BATCHES)]
    batches = [shard_batch(mesh, {name: x[local] for name, x in whole.items()}, rows) for whole in wholes]
    seconds, state, metrics = time_steps(step, state, batches, warmup=request.warmup, steps=request.steps)
    peak_bytes = _peak_bytes(mesh.local_devices)
    result = {
        "name": request.name,
        "config": to_dict(config),
        "parameters": count_parameters(config.model).total,
        "tokens_per_recursion": tokens_per_recursion(config.model),
        **_rates(config, seconds, devices),
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_bytes,
        "program_bytes": program_bytes(step),
        "collectives": _traffic(step, mesh) if mesh.size > 1 else {},
        "metrics": {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "platform": devices[0].platform,
        "versions": {"python": sys.version.split()[0], **installed_versions(_PACKAGES)},
    }
    if not math.isfinite(result["metrics"]["loss"]):
        raise FloatingPointError(f"loss={result['metrics']['loss']} is not finite")
    if request.profile:
        result["profile"] = profile_step(config, mesh, state, batches, Path(request.profile))
    return result


def time_steps(
    step: Callable[..., Any], state: Any, batches: list[Any], *, warmup: int, steps: int
) -> tuple[list[float], Any, Any]:
    """Seconds between the completions of successive steps, with one step always dispatched ahead, as in training."""
    pending, last, seconds = None, 0.0, []
    metrics: Any = None
    for index in range(warmup + steps + 1):
        state, metrics = step(state, batches[index % len(batches)])
        if pending is not None:
            jax.block_until_ready(pending)
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        else:
            last = time.perf_counter()
        pending = metrics
    jax.block_until_ready(pending)
    return seconds[warmup:], state, metrics


def _rates(config: Config, seconds: list[float], devices: list[Any]) -> dict[str, Any]:
    median = statistics.median(seconds)
    tokens = config.train.batch_size * config.model.context_length
    parts = {name: flops * config.train.batch_size for name, flops in train_flops(config.model).items()}
    flops, peak = sum(parts.values()), peak_flops(devices[0])
    return {
        "step_seconds": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "step_seconds_spread": (max(seconds) - min(seconds)) / median,
        "steps_timed": len(seconds),
        "tokens_per_second": tokens / median,
        "train_flops": flops,
        "train_flops_parts": parts,
        "flops_per_second": flops / median,
        "mfu": None if peak is None else flops / median / (peak * len(devices)),
        "peak_flops": peak,
    }


def program_bytes(step: Any) -> dict[str, int] | None:
    """Bytes per device by XLA's own plan: arguments, outputs that are not arguments again, temporaries, and all."""
    plan = step.memory_analysis()
    if plan is None:
        return None
    parts = {
        "arguments": int(plan.argument_size_in_bytes),
        "outputs": int(plan.output_size_in_bytes - plan.alias_size_in_bytes),
        "temporaries": int(plan.temp_size_in_bytes),
    }
    return parts | {"total": sum(parts.values())}


def _traffic(step: Any, mesh: Mesh) -> dict[str, dict[str, int]] | None:
    """What a device receives in a step, by kind of collective; None, and a line in the log, if the text says no."""
    try:
        return bytes_by_kind(collectives(parse(step.as_text()), mesh.size, mesh.shape["slice"]))
    except (ValueError, LookupError) as error:  # a compiler's new notation must not cost the timing
        _log.warning("the compiled step's collectives cannot be read: %s", error)
        return None


def _peak_bytes(devices: list[Any]) -> int | None:
    """Most bytes in use on any of these devices since the process started; None where the backend does not count."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def main(arguments: list[str]) -> int:
    """Read a request, write its result."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mor_jax").setLevel(logging.INFO)
    source, target = map(Path, arguments)
    request = from_dict(Request, json.loads(source.read_text(encoding="utf-8")))
    if request.profile:  # a TPU's compiler tells the cycles of its kernels; to others the flag is nothing
        dump = Path(request.profile) / DUMP
        dump.mkdir(parents=True, exist_ok=True)
        for old in dump.glob("*.txt"):  # of another program, whose kernels may have the same names
            old.unlink()
        dump_into(dump)
    initialize(DistributedConfig(enabled="JAX_COORDINATOR_ADDRESS" in os.environ))
    target.write_text(json.dumps(measure(request)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

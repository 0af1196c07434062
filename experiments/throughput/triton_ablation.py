"""What each kernel in Triton is worth in a train step: the step as it is, and with XLA's in its place, in turn.

    python experiments/throughput/triton_ablation.py --out FILE.json
    python experiments/throughput/triton_ablation.py --case mor-360m-expert-r3:fusion=triton,attention_backend=triton --packed --out FILE.json
    python experiments/throughput/triton_ablation.py --case debug:fusion=triton --rows 2 --steps 1 --rounds 2 --out FILE.json

The second also has the gradient of SwiGLU and attention, which Mosaic computes on Hopper; the third runs on a CPU, in
Pallas' interpreter, and says nothing of speed. The programs are compiled first, then timed round after round.
"""  # noqa: E501

import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from mor_jax.bench.cases import parse_case
from mor_jax.bench.measure import random_batch, time_steps
from mor_jax.bench.run import Settings as BenchSettings
from mor_jax.bench.run import measured_config
from mor_jax.config import Config
from mor_jax.config.io import to_dict
from mor_jax.errors import UserError, require
from mor_jax.kernels import cross_entropy, norm, rotary, swiglu
from mor_jax.kernels.attention import backend
from mor_jax.kernels.attention.cudnn import cudnn_attention
from mor_jax.kernels.attention.mask import Mask
from mor_jax.kernels.attention.reference import plain_attention
from mor_jax.mesh.devices import process_platform
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.perf import resolve_perf
from mor_jax.plan.report import versions
from mor_jax.runs.state import abstract_train_state, init_train_state
from mor_jax.train.step import compile_train_step, train_step

_BATCHES = 4


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often."""

    out: Path
    """JSON file for the results."""
    case: str = "mor-360m-expert-r3"
    """A preset and overrides, as ``mor bench train`` takes them."""
    rows: int = 16
    """Rows of a step."""
    packed: bool = False
    """Documents of 512 tokens on average, which attend to themselves alone."""
    steps: int = 10
    """Timed steps of a program in a round."""
    warmup: int = 2
    """Steps before them."""
    rounds: int = 4

    def __post_init__(self) -> None:
        for name in ("rows", "steps", "rounds"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative")


@dataclass(frozen=True)
class Ablation:
    """How to leave a kernel out."""

    kernels: tuple[str, ...]
    """How its names begin."""
    module: Any
    """Where it is chosen."""
    name: str
    """The function that chooses it."""
    instead: Callable[..., Any]
    """That function's stand-in."""


def _never(*_: Any) -> bool:
    return False


def _dense_attention(
    query_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, mask: Mask, _: str
) -> jax.Array:
    """cuDNN with the mask in memory: what there is without Triton or Mosaic."""
    attention = cudnn_attention if process_platform() == "gpu" else plain_attention
    return attention(query_BTNH, keys_BSKH, values_BSKH, None if mask.is_causal else mask.dense())


ABLATIONS = {
    "norm": Ablation(("mor_add_norm", "mor_skip_norm", "mor_norm_gradient"), norm, "fuses", _never),
    "split and rotation": Ablation(("mor_split_rotate",), rotary, "fuses", _never),
    "gradient of SwiGLU": Ablation(("mor_swiglu_gradient",), swiglu, "fuses", _never),
    "softmax of the loss": Ablation(("mor_cross_entropy",), cross_entropy, "is_available", _never),
    "attention": Ablation(("mor_attention_",), backend, "_by_runs", _dense_attention),
}


@contextlib.contextmanager
def without(name: str | None) -> Iterator[None]:
    """Within this context programs are traced without a kernel of ``ABLATIONS``; None leaves all in place."""
    jax.clear_caches()  # nothing that was traced with other kernels
    ablation = ABLATIONS.get(name or "")
    with mock.patch.object(ablation.module, ablation.name, ablation.instead) if ablation else contextlib.nullcontext():
        yield
    jax.clear_caches()


def triton_kernels(config: Config, mesh: Any) -> Counter[str]:
    """Names of the Triton kernels in the jaxpr of a train step, and how often each is written there."""
    shape = (config.train.batch_size, config.model.context_length + 1)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), jax.ShapeDtypeStruct(shape, jnp.int32))
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda state, batch: train_step(config, state, batch))(
            abstract_train_state(config, mesh), batch
        )
    names = re.findall(r"pallas_call\[.*?\bname=(mor_\w+)", str(jaxpr), re.DOTALL)
    return Counter(name for name in names if "hopper" not in name)


def measure(settings: Settings) -> dict[str, Any]:
    """Compile the step and every variant of it that lacks a kernel, time them in turn, and write the file.

    Raises:
        UserError: the case is refused, or its step has no kernel in Triton.
    """
    device = jax.devices()[0]
    bench = BenchSettings(rows=settings.rows, packed=settings.packed)
    config = measured_config(parse_case(settings.case).config, bench)
    mesh = make_mesh(config.mesh, [device])
    config = dataclasses.replace(config, perf=resolve_perf(config, mesh).asked)
    record: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device.device_kind,
        "versions": versions(),
        "config": to_dict(config),
    }
    state = init_train_state(config, mesh)
    batches = [
        shard_batch(mesh, random_batch(config.model, settings.rows, packed=settings.packed, seed=seed))
        for seed in range(_BATCHES)
    ]
    variants, steps = _compile(config, mesh, state, batches[0])
    times: list[list[list[float]]] = [[] for _ in steps]
    for _ in range(settings.rounds):
        for step, found in zip(steps, times, strict=True):
            seconds, state, _ = time_steps(step, state, batches, warmup=settings.warmup, steps=settings.steps)
            found.append(seconds)
    medians = [statistics.median(second for seconds in found for second in seconds) for found in times]
    for variant, median, found in zip(variants, medians, times, strict=True):
        variant["milliseconds"] = 1e3 * median
        variant["milliseconds_by_round"] = [1e3 * statistics.median(seconds) for seconds in found]
        variant["kernel_saves_milliseconds"] = 1e3 * (median - medians[0])
    record["variants"] = variants
    settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _compile(config: Config, mesh: Any, state: Any, batch: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """(what is known of each program, the programs): first the step as it is, then without each kernel that it has."""
    variants: list[dict[str, Any]] = []
    steps: list[Any] = []
    for name in (None, *ABLATIONS):
        if name is not None and not _of(name, variants[0]["kernels"]):
            continue
        with without(name):
            kernels = triton_kernels(config, mesh)
            require(name is not None or bool(kernels), "this step has no kernel in Triton")
            if name is not None and _of(name, kernels):
                raise RuntimeError(f"without {name!r} the step still has {_of(name, kernels)}")
            begin = time.perf_counter()
            step: Any = compile_train_step(config, mesh)
            seconds = time.perf_counter() - begin
        _, metrics = step(jax.tree.map(jnp.copy, state), batch)
        variant = {"without": name, "kernels": dict(kernels), "compile_seconds": seconds}
        variants.append(variant | {"first_loss": float(metrics["loss"])})
        steps.append(step)
        print(json.dumps(variants[-1]), file=sys.stderr, flush=True)
    return variants, steps


def _of(name: str, kernels: Any) -> list[str]:
    return [kernel for kernel in kernels if kernel.startswith(ABLATIONS[name].kernels)]


def main() -> int:
    """Run and print; 2 where there is nothing to measure."""
    settings = tyro.cli(Settings, description=__doc__)
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        record = measure(settings)
    except (UserError, OSError) as error:
        print(f"triton_ablation: {error}", file=sys.stderr)
        return 2
    for variant in record["variants"]:
        name = "as it is" if variant["without"] is None else f"without {variant['without']}"
        print(f"{name:28} {variant['milliseconds']:9.2f} ms  {variant['kernel_saves_milliseconds']:+7.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pieces of a training step before and after their GPU kernel, in one run: medians, JSON.

Usage: python experiments/throughput/kernels.py --out FILE [--cases skip_norm projection ...] [--tune]
Shapes are those of the 360M model on 16 rows of 2048 tokens in bfloat16, and of its second recursion (1368 slots).
``CASES`` names the pieces, each a function of the shape that returns the variants, oldest first.
Letters: B rows, C tokens of a row, D model, N query heads, K key/value heads, H head dim, X = (N + 2K) H.
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
import jax.numpy as jnp
import tyro

from mor_jax.errors import UserError, require
from mor_jax.model import fused_gpu, rotary_gpu
from mor_jax.model.attention import project_qkv
from mor_jax.model.fused_gpu import skip_norm
from mor_jax.model.layers import apply_rotary, compute_weight, rms_norm, rotary_tables
from mor_jax.model.rotary_gpu import split_rotate
from mor_jax.plan.report import versions

_EPSILON = 1e-5
_WARMUP = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of the pieces."""

    rows: int = 16
    tokens: int = 2048
    selected: int = 1368
    """Tokens of a row in the second recursion."""
    width: int = 960
    heads: int = 15
    kv_heads: int = 5
    head_dim: int = 64
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    variants: Mapping[str, Callable[..., Any]]
    """What computes it, by name, the oldest first; the others' speed-ups are over that one."""
    arguments: tuple[Any, ...]
    least_bytes: int | None = None
    """Traffic if every input is read and every output written once: for pieces that the memory's speed limits."""


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


def _normal(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _inputs(shape: Shape, tokens: int) -> tuple[jax.Array, ...]:
    """Hidden states, scale, both weights (normal with deviation 0.02), cosine and sine."""
    width, head_dim, dtype = shape.width, shape.head_dim, shape.dtype
    positions_BC = jnp.tile(jnp.arange(tokens, dtype=jnp.int32)[None], (shape.rows, 1))
    return (
        _normal(0, shape.rows, tokens, width, dtype=dtype),
        jnp.ones(width),
        0.02 * _normal(1, width, shape.heads, head_dim, dtype=dtype),
        0.02 * _normal(2, width, 2, shape.kv_heads, head_dim, dtype=dtype),
        *rotary_tables(positions_BC, head_dim, 10_000.0),
    )


def _with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Outputs and the gradients of the first ``count`` arguments, for the cotangents that come last."""

    def run(*arguments: Any) -> Any:
        *inputs, grads = arguments
        out, pull = jax.vjp(lambda *first: function(*first, *inputs[count:]), *inputs[:count])
        return out, pull(grads)

    return run


def _cotangents(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda a: _normal(3, *a.shape, dtype=a.dtype), shapes)


def _skip_norm(shape: Shape) -> Case:
    """The norm at the start of a layer, forward."""
    x_BCD, scale_D, *_ = _inputs(shape, shape.tokens)
    variants = {
        "xla": lambda x_BCD, scale_D: rms_norm(x_BCD, scale_D, _EPSILON),
        "kernel": lambda x_BCD, scale_D: skip_norm(x_BCD, scale_D, _EPSILON)[1],
    }
    return Case(variants, (x_BCD, scale_D), 2 * x_BCD.nbytes)


def _split_rotate(shape: Shape, *, backward: bool) -> Case:
    """The joint product to rotated queries, rotated keys, and values; or their gradients back."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    *_, cos, sin = _inputs(shape, shape.tokens)
    joint_BCX = _normal(4, shape.rows, shape.tokens, (heads + 2 * kv_heads) * head_dim, dtype=shape.dtype)

    def plain(joint_BCX: jax.Array, *rotary: jax.Array) -> Any:
        joint_BCMH = joint_BCX.reshape(*joint_BCX.shape[:2], -1, head_dim)
        query, key, value = jnp.split(joint_BCMH, [heads, heads + kv_heads], axis=2)
        return apply_rotary(query, (rotary[0], rotary[1])), apply_rotary(key, (rotary[0], rotary[1])), value

    def kernel(joint_BCX: jax.Array, *rotary: jax.Array) -> Any:
        return split_rotate(joint_BCX, (rotary[0], rotary[1]), heads, kv_heads)

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda joint, cos, sin, grads: jax.vjp(lambda x: function(x, cos, sin), joint)[1](grads)

    least_bytes = 2 * joint_BCX.nbytes + cos.nbytes + sin.nbytes
    arguments = (joint_BCX, cos, sin)
    if not backward:
        return Case({"xla": plain, "kernel": kernel}, arguments, least_bytes)
    arguments = (*arguments, _cotangents(plain, arguments))
    return Case({"xla": gradient(plain), "kernel": gradient(kernel)}, arguments, least_bytes)


def _projection(shape: Shape, tokens: int) -> Case:
    """Norm (the kernel), rotated queries, rotated keys and values, with gradients of input, scale and weights."""

    def separate(x_BCD: Any, scale_D: Any, query: Any, key_value: Any, cos: Any, sin: Any) -> Any:
        x_BCD, normed_BCD = skip_norm(x_BCD, scale_D, _EPSILON)
        query, key_value = compute_weight(query), compute_weight(key_value)
        rotated = apply_rotary(jnp.einsum("BCD,DNH->BCNH", normed_BCD, query), (cos, sin))
        both = jnp.einsum("BCD,DXKH->BCXKH", normed_BCD, key_value)
        return x_BCD, (rotated, (apply_rotary(both[:, :, 0], (cos, sin)), both[:, :, 1]))

    def joint(x_BCD: Any, scale_D: Any, query: Any, key_value: Any, cos: Any, sin: Any) -> Any:
        x_BCD, normed_BCD = skip_norm(x_BCD, scale_D, _EPSILON)
        return x_BCD, project_qkv(normed_BCD, query, key_value, (cos, sin))

    arguments = _inputs(shape, tokens)
    grads = _cotangents(separate, arguments)
    variants = {name: _with_gradients(f, 4) for name, f in {"separate": separate, "joint": joint}.items()}
    return Case(variants, (*arguments, grads))


CASES: dict[str, Callable[[Shape], Case]] = {
    "skip_norm": _skip_norm,
    "split_rotate": lambda shape: _split_rotate(shape, backward=False),
    "split_rotate_gradient": lambda shape: _split_rotate(shape, backward=True),
    "projection": lambda shape: _projection(shape, shape.tokens),
    "projection_selected": lambda shape: _projection(shape, shape.selected),
}
"""The pieces, by name."""

_ROTARY_SIZES = (rotary_gpu, {"ROWS": (8, 16, 32, 64), "HEADS": (5, 25), "WARPS": (2, 4, 8)})
TUNABLE: dict[str, tuple[ModuleType, Mapping[str, tuple[int, ...]]]] = {
    "skip_norm": (fused_gpu, {"ROWS": (1, 2, 4, 8), "WARPS": (2, 4, 8)}),
    "split_rotate": _ROTARY_SIZES,
    "split_rotate_gradient": _ROTARY_SIZES,
}
"""Module constants of a piece's last variant, and values to try."""


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

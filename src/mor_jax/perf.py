"""What `perf` leaves open, chosen by device and shape: unrolling, rematerialisation, loss chunk, XLA options.

Every choice is logged with its reason and can be overridden; the figures behind them are in docs/performance.md.
Letters: B rows, T positions, L layers, D F N K H as everywhere.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from mor_jax.config import AttentionBackend, Config, Fusion, ModelConfig, PerfConfig, Remat
from mor_jax.errors import require
from mor_jax.kernels import pallas_triton, swiglu_hopper
from mor_jax.kernels.attention.backend import resolve_backend
from mor_jax.kernels.choice import log_kernel
from mor_jax.mesh.axes import BATCH_AXES
from mor_jax.mesh.devices import Device, memory_bytes
from mor_jax.model.flops import count_parameters, layer_passes
from mor_jax.model.transformer import init_params

_log = logging.getLogger(__name__)

PLAIN = PerfConfig(
    remat="none",
    scan_unroll=1,
    loss_chunk=512,
    slot_multiple=1,
    logits_dtype="float32",
    fusion="xla",
    whole_block=True,
    compiler_options=(),
)
"""What an open field means outside a compiled train step (evaluation, notebooks), and on a CPU."""

COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "gpu": {},
    "tpu": {},
    "cpu": {},
}
"""Per backend: XLA option `name=value` and why it is set."""

_USABLE = 0.85
"""Share of the memory that estimates may fill: allocators fragment and kernels need workspace."""
_WHOLE_BLOCK = 0.1
"""Share of the memory that the whole weights of a shared block may take."""
_MOSAIC_REMAT: tuple[Remat, ...] = ("none", "full")
"""Rematerialisation beside SwiGLU in epilogues: others keep named tensors or XLA's products, which the results
of those kernels are not, and would run them again as a whole."""
_CHUNK_TOKENS = 4096
"""Positions x rows of one loss chunk on an accelerator: products that fill the chip, logits that stay small."""


def resolve_perf(config: Config, mesh: Mesh) -> PerfConfig:
    """Fill the open fields of ``config.perf`` for a train step on a mesh.

    Args:
        config: model, batch and ``perf``.
        mesh: where the step will run; only its first device is looked at.

    Returns:
        ``config.perf`` without `auto` or None (the attention backend stays `auto` where the model chooses it).

    Raises:
        UserError: kernels were asked for where they cannot run.
    """
    device = mesh.devices.flat[0]
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    rows = max(1, config.train.batch_size // config.train.accumulation // shards)
    perf, platform = config.perf, device.platform
    half = config.model.dtype == "bfloat16"
    if platform == "cpu":
        chosen = _fill(perf, PLAIN)
    else:
        whole_block = _whole_block_fits(config, device) if perf.whole_block is None else perf.whole_block
        remat = perf.remat
        if remat == "auto":
            remat = _least_remat(config, rows / mesh.shape.get("context", 1), device, whole_block=whole_block)
        defaults = PerfConfig(
            remat=remat,
            scan_unroll=0 if platform == "gpu" else 1,
            loss_chunk=max(1, _CHUNK_TOKENS // rows),
            slot_multiple=8 if platform == "gpu" else 1,
            logits_dtype="bfloat16" if platform == "gpu" and half else "float32",
            fusion=_fusion(config, mesh, remat),
            whole_block=whole_block,
            attention_backend=_attention(config, mesh, platform),
            compiler_options=tuple(COMPILER_OPTIONS.get(platform, ())),
        )
        chosen = _fill(perf, defaults)
    if perf.fusion == "triton":
        pallas_triton.require_triton("perf.fusion='triton'")
    if perf.fusion == "mosaic":
        _require_mosaic_fits(config, mesh, chosen.remat)
    _report(platform, perf, chosen)
    return chosen


def _mosaic_fits(config: Config, mesh: Mesh, remat: Remat) -> bool:
    """Whether SwiGLU can be computed in the epilogues of its matrix products."""
    model, platform = config.model, mesh.devices.flat[0].platform
    ffn, rows_whole = model.d_ff // config.mesh.tensor, mesh.shape.get("context", 1) == 1
    available = platform == "gpu" and swiglu_hopper.is_available(model.dtype, model.d_model, ffn)
    return available and rows_whole and remat in _MOSAIC_REMAT


def _require_mosaic_fits(config: Config, mesh: Mesh, remat: Remat) -> None:
    """Refuse ``fusion=mosaic`` where it cannot run."""
    model = config.model
    require(
        _mosaic_fits(config, mesh, remat),
        "perf.fusion='mosaic' needs a Hopper GPU, bfloat16, d_model in multiples of 64, d_ff per device of 256,"
        f" mesh.context=1 and perf.remat of {' or '.join(_MOSAIC_REMAT)}; not"
        f" device={mesh.devices.flat[0].platform!r}, dtype={model.dtype!r}, d_model={model.d_model},"
        f" d_ff={model.d_ff // config.mesh.tensor}, context={mesh.shape.get('context', 1)}, remat={remat!r}",
    )


def _fusion(config: Config, mesh: Mesh, remat: Remat) -> Fusion:
    """Kernels that suit device, mesh, model and rematerialisation."""
    platform = mesh.devices.flat[0].platform
    if platform != "gpu" or config.model.dtype != "bfloat16" or mesh.shape.get("context", 1) != 1:
        return "xla"
    if _mosaic_fits(config, mesh, remat):
        return "mosaic"
    if not pallas_triton.is_available():
        log_kernel("norms, rotations, SwiGLU, softmax of the loss", f"XLA ({pallas_triton.MISSING})")
        return "xla"
    return "triton"


def _attention(config: Config, mesh: Mesh, platform: str) -> AttentionBackend:
    """On a GPU the choice depends on the mesh's size; elsewhere the model makes it."""
    if platform != "gpu":
        return "auto"
    return resolve_backend("auto", config.model.dtype, config.model.head_dim, mesh.size)


@functools.lru_cache(maxsize=64)
def _report(platform: str, asked: PerfConfig, chosen: PerfConfig) -> None:
    """Log a choice once."""
    names = (
        "remat",
        "scan_unroll",
        "loss_chunk",
        "slot_multiple",
        "logits_dtype",
        "fusion",
        "whole_block",
        "attention_backend",
        "compiler_options",
    )
    parts = [
        f"{name}={getattr(chosen, name)!r}{'' if getattr(asked, name) == getattr(chosen, name) else ' (chosen)'}"
        for name in names
    ]
    _log.info("perf for %s: %s", platform, ", ".join(parts))


def _fill(perf: PerfConfig, defaults: PerfConfig) -> PerfConfig:
    return dataclasses.replace(
        perf,
        remat=defaults.remat if perf.remat == "auto" else perf.remat,
        scan_unroll=defaults.scan_unroll if perf.scan_unroll is None else perf.scan_unroll,
        loss_chunk=defaults.loss_chunk if perf.loss_chunk is None else perf.loss_chunk,
        slot_multiple=defaults.slot_multiple if perf.slot_multiple is None else perf.slot_multiple,
        logits_dtype=defaults.logits_dtype if perf.logits_dtype == "auto" else perf.logits_dtype,
        fusion=defaults.fusion if perf.fusion == "auto" else perf.fusion,
        whole_block=defaults.whole_block if perf.whole_block is None else perf.whole_block,
        attention_backend=(defaults.attention_backend if perf.attention_backend == "auto" else perf.attention_backend),
        compiler_options=defaults.compiler_options if perf.compiler_options is None else perf.compiler_options,
    )


def loss_chunk(perf: PerfConfig) -> int:
    """Positions per chunk of the loss where no train step has chosen them."""
    assert PLAIN.loss_chunk is not None
    return PLAIN.loss_chunk if perf.loss_chunk is None else perf.loss_chunk


def compiler_options(perf: PerfConfig) -> dict[str, str | bool]:
    """XLA options of a resolved ``perf`` as the compiler takes them: true and false, in any case, as bools.

    XLA refuses the texts "true" and "false" where it wants a bool.
    """
    options: dict[str, str | bool] = {}
    for option in perf.compiler_options or ():
        name, _, value = option.partition("=")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def kept_values(model: ModelConfig, remat: Remat) -> int:
    """Values per token and layer application that the forward pass keeps for the backward pass, by estimate.

    `none`: two norms' inputs and outputs (4 D), queries before and after rotation and the attention's output (3 N H),
    keys and values (4 K H), gate, up and their product (3 F), and 2 D for what XLA keeps in float32. `names`: the named
    tensors and the layer's input. `dots`: every product's result. `full`: the layer's input. `auto` counts as `none`.
    """
    d, f = model.d_model, model.d_ff
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "none": 6 * d + 3 * heads + 4 * kv + 3 * f,
        "dots": 3 * d + 2 * heads + 2 * kv + 2 * f,
        "names": d + 2 * heads + 2 * kv + 2 * f,
        "full": d,
    }["none" if remat == "auto" else remat]


def activation_bytes(model: ModelConfig, rows: float, remat: Remat) -> float:
    """Estimate the bytes that the backward pass keeps of the layers of ``rows`` rows, in the compute dtype."""
    width = 2 if model.dtype == "bfloat16" else 4
    passes = layer_passes(model, model.context_length)
    return width * kept_values(model, remat) * rows * sum(p.layers * p.computed for p in passes)


def state_bytes(config: Config, shards: int) -> int:
    """Bytes per device of float32 weights, two moments and gradients, and the compute copy of the weights."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    return count_parameters(config.model).total * (4 * 4 + width) // shards


@functools.cache
def block_parameters(model: ModelConfig) -> int:
    """Parameters of the shared block."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))["block"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def _whole_block_bytes(config: Config) -> float:
    """Bytes per device of the whole shared block in the compute dtype."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    return block_parameters(config.model) * width / config.mesh.tensor


def _whole_block_fits(config: Config, device: Device) -> bool:
    """Whether the whole shared block takes a tenth of the memory at most."""
    memory = memory_bytes(device)
    return memory is None or _whole_block_bytes(config) <= _WHOLE_BLOCK * memory


def _least_remat(config: Config, rows: float, device: Device, *, whole_block: bool) -> Remat:
    """The least rematerialisation whose estimate fits; `none` where the memory is not known."""
    memory = memory_bytes(device)
    if memory is None:
        return "none"
    loss_bytes = 3 * 4 * _CHUNK_TOKENS * config.model.vocab_size
    left = _USABLE * memory - state_bytes(config, max(1, config.mesh.fsdp * config.mesh.tensor)) - loss_bytes
    if whole_block and config.mesh.fsdp > 1 and config.model.recursion.repeats_block:
        left -= _whole_block_bytes(config)
    candidates: tuple[Remat, ...] = ("none",) if config.perf.fusion == "mosaic" else ("none", "names")
    for remat in candidates:
        if activation_bytes(config.model, rows, remat) <= left:
            return remat
    return "full"

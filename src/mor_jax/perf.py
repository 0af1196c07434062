"""What `perf` leaves open, chosen by device and shape: unrolling, rematerialisation, loss chunk, XLA options.

Every choice is logged with its reason and can be overridden; the figures behind them are in docs/performance.md.
Letters: B rows, T positions, L layers, D F N K H as everywhere.
"""

import functools
import logging
import math
from collections.abc import Mapping

from jax.sharding import Mesh

from mor_jax.config import (
    PLAIN,
    AttentionBackend,
    Config,
    Kernels,
    ModelConfig,
    PerfConfig,
    RematPolicy,
    ResolvedPerf,
)
from mor_jax.errors import require
from mor_jax.kernels import pallas_triton, swiglu_hopper
from mor_jax.kernels.attention.backend import resolve_backend
from mor_jax.kernels.choice import log_kernel
from mor_jax.mesh.axes import BATCH_AXES
from mor_jax.mesh.devices import Device, chip_of, memory_bytes
from mor_jax.model.flops import block_parameters, count_parameters, layer_passes
from mor_jax.model.optimizer_costs import moment_values

_log = logging.getLogger(__name__)

_VMEM = "tiles of products that read their inputs fewer times; chips that are not here keep the compiler's 16 MiB or so"
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "v5e": {"xla_tpu_scoped_vmem_limit_kib=32768": _VMEM},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib=98304": _VMEM},
}
"""By chip: XLA option `name=value` and why it is set; by the compiler's clock (experiments/tpu_clock/LOG.md)."""

_USABLE = 0.85
"""Share of the memory that estimates may fill: allocators fragment and kernels need workspace."""
_WHOLE_BLOCK = 0.1
"""Share of the memory that the whole weights of a shared block may take."""
_MOSAIC_REMAT: tuple[RematPolicy, ...] = ("none", "full")
"""Rematerialisation beside SwiGLU in epilogues: others keep named tensors or XLA's products, which the results
of those kernels are not, and would run them again as a whole."""
_TPU_REMAT: tuple[RematPolicy, ...] = ("attention",)
"""What a TPU takes before `full`: by the compiler's clock keeping more costs more, as a loop writes what it keeps into
stacks and cuts it out again (experiments/tpu_clock/README.md)."""
_CHUNK_TOKENS = 4096
"""Positions x rows of one loss chunk on a GPU: products that fill the chip, logits that stay small."""
_TPU_CHUNK_TOKENS = 1024
"""On a TPU, by the compiler's clock (experiments/plan/LOG.md)."""


def resolve_perf(config: Config, mesh: Mesh) -> ResolvedPerf:
    """Choose what ``config.perf`` leaves open for a train step on a mesh.

    Args:
        config: model, batch and ``perf``.
        mesh: where the step will run; only its first device is looked at.

    Returns:
        What the model is executed with (the attention backend stays `auto` where the model chooses it).

    Raises:
        UserError: kernels were asked for where they cannot run.
    """
    device = mesh.devices.flat[0]
    defaults = PLAIN if device.platform == "cpu" else _defaults(config, mesh)
    chosen = config.perf.resolved(defaults)
    if config.perf.fusion == "triton":
        pallas_triton.require_triton("perf.fusion='triton'")
    if config.perf.fusion == "mosaic":
        _require_mosaic_fits(config, mesh, chosen.remat)
    _report(device.platform, config.perf, chosen)
    return chosen


def _defaults(config: Config, mesh: Mesh) -> ResolvedPerf:
    """What an open field means on an accelerator; some depend on fields that are not open."""
    device, perf = mesh.devices.flat[0], config.perf
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    rows = max(1, config.train.batch_size // config.train.accumulation // shards)
    on_gpu, half, chip = device.platform == "gpu", config.model.dtype == "bfloat16", chip_of(device)
    whole_block = _whole_block_fits(config, device) if perf.whole_block is None else perf.whole_block
    remat = perf.remat
    if remat == "auto":
        remat = _least_remat(config, rows / mesh.shape.get("context", 1), device, whole_block=whole_block)
    return ResolvedPerf(
        attention_backend=_attention(config, mesh),
        remat=remat,
        scan_unroll=0 if on_gpu else 1,
        loss_chunk=max(1, (_TPU_CHUNK_TOKENS if device.platform == "tpu" else _CHUNK_TOKENS) // rows),
        slot_multiple={"gpu": 8, "tpu": 16}.get(device.platform, 1),
        logits_dtype="bfloat16" if half else "float32",
        fusion=_fusion(config, mesh, remat),
        whole_block=whole_block,
        compiler_options=() if chip is None else tuple(COMPILER_OPTIONS.get(chip.name, ())),
    )


def _mosaic_fits(config: Config, mesh: Mesh, remat: RematPolicy) -> bool:
    """Whether SwiGLU can be computed in the epilogues of its matrix products."""
    model, platform = config.model, mesh.devices.flat[0].platform
    ffn, rows_whole = model.d_ff // config.mesh.tensor, mesh.shape.get("context", 1) == 1
    available = platform == "gpu" and swiglu_hopper.is_available(model.dtype, model.d_model, ffn)
    return available and rows_whole and remat in _MOSAIC_REMAT


def _require_mosaic_fits(config: Config, mesh: Mesh, remat: RematPolicy) -> None:
    """Refuse ``fusion=mosaic`` where it cannot run."""
    model = config.model
    require(
        _mosaic_fits(config, mesh, remat),
        "perf.fusion='mosaic' needs a Hopper GPU, bfloat16, d_model in multiples of 64, d_ff per device of 256,"
        f" mesh.context=1 and perf.remat of {' or '.join(_MOSAIC_REMAT)}; not"
        f" device={mesh.devices.flat[0].platform!r}, dtype={model.dtype!r}, d_model={model.d_model},"
        f" d_ff={model.d_ff // config.mesh.tensor}, context={mesh.shape.get('context', 1)}, remat={remat!r}",
    )


def _fusion(config: Config, mesh: Mesh, remat: RematPolicy) -> Kernels:
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


def _attention(config: Config, mesh: Mesh) -> AttentionBackend:
    """On a GPU the choice depends on the mesh's size; elsewhere the model makes it."""
    if mesh.devices.flat[0].platform != "gpu":
        return "auto"
    return resolve_backend("auto", config.model.dtype, config.model.head_dim, mesh.size)


@functools.lru_cache(maxsize=64)
def _report(platform: str, asked: PerfConfig, chosen: ResolvedPerf) -> None:
    """Log a choice once."""
    parts = [
        f"{name}={value!r}{'' if getattr(asked, name) == value else ' (chosen)'}"
        for name, value in vars(chosen).items()
        if name != "execution"  # never chosen here
    ]
    _log.info("perf for %s: %s", platform, ", ".join(parts))


def compiler_options(perf: ResolvedPerf) -> dict[str, str | bool]:
    """XLA options as the compiler takes them: true and false, in any case, as bools.

    XLA refuses the texts "true" and "false" where it wants a bool.
    """
    options: dict[str, str | bool] = {}
    for option in perf.compiler_options:
        name, _, value = option.partition("=")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def kept_values(model: ModelConfig, remat: RematPolicy) -> int:
    """Values per token and layer application that the forward pass keeps for the backward pass, by estimate.

    `none`: two norms' inputs and outputs (4 D), queries before and after rotation and the attention's output (3 N H),
    keys and values (4 K H), gate, up and their product (3 F), and 2 D for what XLA keeps in float32. `dots`: every
    product's result. `full`: the layer's input. `attention`: that, and attention's output with float32 sums of its
    powers; `projections`: queries, keys and values, too; `names`: gate and up, too.
    """
    d, f = model.d_model, model.d_ff
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = d + heads + 2 * model.num_heads
    projections = attention + heads + 2 * kv
    return {
        "none": 6 * d + 3 * heads + 4 * kv + 3 * f,
        "dots": 3 * d + 2 * heads + 2 * kv + 2 * f,
        "names": projections + 2 * f,
        "projections": projections,
        "attention": attention,
        "full": d,
    }[remat]


def activation_bytes(model: ModelConfig, rows: float, remat: RematPolicy) -> float:
    """Estimate the bytes that the backward pass keeps of the layers of ``rows`` rows, in the compute dtype."""
    width = 2 if model.dtype == "bfloat16" else 4
    passes = layer_passes(model, model.context_length)
    return width * kept_values(model, remat) * rows * sum(p.layers * p.computed for p in passes)


def state_bytes(config: Config, shards: int) -> int:
    """Bytes per device of float32 weights, moments and gradients, and the compute copy of the weights."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    return (count_parameters(config.model).total * (2 * 4 + width) + 4 * moment_values(config)) // shards


def _whole_block_bytes(config: Config) -> float:
    """Bytes per device of the whole shared block in the compute dtype."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    return block_parameters(config.model) * width / config.mesh.tensor


def _whole_block_fits(config: Config, device: Device) -> bool:
    """Whether the whole shared block takes a tenth of the memory at most."""
    memory = memory_bytes(device)
    return memory is None or _whole_block_bytes(config) <= _WHOLE_BLOCK * memory


def _least_remat(config: Config, rows: float, device: Device, *, whole_block: bool) -> RematPolicy:
    """The first candidate that fits by estimate, or `full`; `none` if the memory is not known."""
    memory = memory_bytes(device)
    if memory is None:
        return "none"
    loss_bytes = 3 * 4 * _CHUNK_TOKENS * config.model.vocab_size
    left = _USABLE * memory - state_bytes(config, max(1, config.mesh.fsdp * config.mesh.tensor)) - loss_bytes
    if whole_block and config.mesh.fsdp > 1 and config.model.recursion.repeats_block:
        left -= _whole_block_bytes(config)
    candidates: tuple[RematPolicy, ...] = ("none",) if config.perf.fusion == "mosaic" else ("none", "names")
    if device.platform == "tpu":
        candidates = _TPU_REMAT
    for remat in candidates:
        if activation_bytes(config.model, rows, remat) <= left:
            return remat
    return "full"

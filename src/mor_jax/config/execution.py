"""How a model is executed and split: nothing here changes what it computes, so it may differ after a restore.

``PerfConfig`` is what is asked for and saved; ``ResolvedPerf`` leaves nothing open and is what the model is given.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mor_jax.config.checks import require_choice, require_not_negative
from mor_jax.config.model import Dtype
from mor_jax.errors import require

Execution = Literal["gather", "scan"]
AttentionBackend = Literal["auto", "xla", "cudnn", "triton", "mosaic", "mosaic_tpu"]
RematPolicy = Literal["none", "full", "dots", "names", "projections", "attention"]
Remat = Literal["auto", RematPolicy]
Kernels = Literal["xla", "triton", "mosaic"]
Fusion = Literal["auto", Kernels]
LogitsDtype = Literal["auto", Dtype]


@dataclass(frozen=True)
class ResolvedPerf:
    """How the model is executed, with nothing left open; the fields are those of ``PerfConfig``.

    The defaults (``PLAIN``) are what an open field means on a CPU, and outside a compiled train step.
    """

    execution: Execution = "gather"
    attention_backend: AttentionBackend = "auto"
    """`auto`: the attention chooses for the device that it is traced for, and logs it."""
    remat: RematPolicy = "none"
    scan_unroll: int = 1
    """Layers unrolled per step of the layer scan; 0 unrolls all."""
    loss_chunk: int = 512
    slot_multiple: int = 1
    logits_dtype: Dtype = "float32"
    fusion: Kernels = "xla"
    whole_block: bool = True
    compiler_options: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether norms, SwiGLU, rotations and the loss's softmax are this project's kernels."""
        return self.fusion != "xla"

    @property
    def asked(self) -> "PerfConfig":
        """The request for exactly this."""
        return PerfConfig(**asdict(self))


PLAIN = ResolvedPerf()
"""No unrolling, no rematerialisation, no kernels of this project."""


@dataclass(frozen=True)
class PerfConfig:
    """How the model is executed; never what it computes (but see `execution`).

    What is left open (`auto`, None) is chosen by device and shape when a train step is compiled, and logged
    (``mor_jax.perf``).
    """

    execution: Execution = "gather"
    """`gather` computes only the selected tokens (static shapes); `scan` is nn.scan with depth masks. They agree,
    except that token-choice under `gather` drops tokens beyond its seats."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel; `auto` chooses by device and mask and logs its choice."""
    remat: Remat = "auto"
    """What of the layers is made again in the backward pass rather than kept: nothing, everything but a layer's input
    (`full`), or all but what is named: attention's output (`attention`), with it queries, keys and values
    (`projections`), with them gate and up (`names`); `dots` keeps all matrix products. `auto` is the least that fits
    the memory, on TPUs `attention` if it fits, else `full`."""
    scan_unroll: int | None = None
    """Layers unrolled per step of the layer scan; 0 unrolls all; None is all on a GPU, 1 elsewhere."""
    loss_chunk: int | None = None
    """Positions per chunk of the fused cross-entropy; None chooses by device and batch."""
    slot_multiple: int | None = None
    """`gather`: computed lengths are filled up to a multiple of this with slots that hold no selected token, because
    kernels like round lengths; exactly k tokens count in any case. None is 8 on a GPU, 16 on a TPU, 1 elsewhere."""
    logits_dtype: LogitsDtype = "auto"
    """How the loss keeps the logits of a chunk; softmax and sums are float32 in any case. `auto` is bfloat16 for a
    bfloat16 model on a GPU or TPU (as the release rounds them), float32 elsewhere."""
    fusion: Fusion = "auto"
    """Norms, SwiGLU, the projections' gradients and the softmax of the loss: as XLA fuses them, or this project's
    kernels (GPUs, rows whole). `mosaic` has SwiGLU in the epilogues of its matmuls, too: on Hopper, with remat none or
    full, where the feed-forward has no low-rank updates."""
    whole_block: bool | None = None
    """Under `fsdp`: gather the shared block's weights once per micro-batch, for all recursions, forward and backward,
    and keep them whole in the compute dtype, rather than gather them at every use; None is yes if they take at most
    a tenth of the memory."""
    compiler_options: tuple[str, ...] | None = None
    """XLA options of the train step as `name=value`, instead of the device's, which None takes (``mor_jax.perf`` gives
    the reasons)."""

    def __post_init__(self) -> None:
        require_choice("perf.execution", self.execution, Execution)
        require_choice("perf.attention_backend", self.attention_backend, AttentionBackend)
        require_choice("perf.remat", self.remat, Remat)
        require_choice("perf.logits_dtype", self.logits_dtype, LogitsDtype)
        require_choice("perf.fusion", self.fusion, Fusion)
        require_not_negative(scan_unroll=self.scan_unroll or 0)
        for name in ("loss_chunk", "slot_multiple"):
            value = getattr(self, name)
            require(value is None or value > 0, f"perf.{name}={value} must be positive")
        for option in self.compiler_options or ():
            require("=" in option, f"perf.compiler_options: {option!r} is not of the form name=value")

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Return JSON values of any age as today's: TPUs had the attention kernel `splash` before `mosaic_tpu`."""
        old = values.get("attention_backend") == "splash"
        return {**values, "attention_backend": "mosaic_tpu"} if old else values

    def resolved(self, defaults: ResolvedPerf = PLAIN) -> ResolvedPerf:
        """Return this with ``defaults`` where it leaves a field open."""
        chosen = {
            name: getattr(defaults, name) if value is None or value == "auto" else value
            for name, value in vars(self).items()
        }
        return ResolvedPerf(**chosen)


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; data = -1 takes what the others leave."""

    slice: int = 1
    """TPU slices joined by the data-center network: replicas that split the batch."""
    data: int = -1
    """Replicas that split the batch."""
    fsdp: int = 1
    """Shards of parameters and optimiser state (also splits the batch)."""
    context: int = 1
    """Shards of each row's tokens."""
    tensor: int = 1
    """Shards of heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        require(self.data == -1 or self.data > 0, f"mesh.data={self.data} must be positive, or -1 for the rest")
        for name in ("slice", "fsdp", "context", "tensor"):
            size = getattr(self, name)
            require(size > 0, f"mesh.{name}={size} must be positive")

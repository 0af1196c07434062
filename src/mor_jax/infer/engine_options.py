"""What a user chooses of an engine, its sizes and devices; needs no jax, so that commands can parse it at once."""

from dataclasses import dataclass
from typing import Literal, get_args

from mor_jax.errors import require

DecodeBackend = Literal["auto", "xla", "pallas"]
KvDtype = Literal["model", "int8"]


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; those that are None follow from the others and the model (``engine_shape``)."""

    max_running: int = 8
    """Sequences decoded at the same time, on every copy of the engine (mesh.data)."""
    max_length: int | None = 2048
    """Tokens of prompt and completion; None is the model's context."""
    block_slots: int | None = None
    """Tokens that one pass over the block computes; None is two thirds of max_running (all for one pass)."""
    exit_slots: int | None = None
    """Tokens that leave and enter together; None is what block_slots leave of max_running (all for one pass)."""
    exit_at: int | None = None
    """Tokens that make an exit step due; None is exit_slots, 1 runs one in every step."""
    staged: int | None = None
    """Further sequences whose prompt is read ahead; None is a quarter of max_running, at least 2."""
    steps: int = 16
    """Block passes between two looks of the host: fewer answer sooner, more waste less."""
    page_size: int = 16
    """Cache entries per page."""
    prefill_rows: int | None = None
    """Prompts that are read at a time; None is an eighth of max_running, at least 4, else 4,096 tokens at most."""
    prefill_chunk: int | None = None
    """Prompt tokens that are read at a time; None is 128, and 1,024 on a GPU where max_length exceeds 4,096."""
    block_pages: int | None = None
    """Pages of the block's caches; None is enough for every sequence at its longest and deepest."""
    edge_pages: int | None = None
    """Pages of the first and last layers' caches; None likewise."""
    kept: int = 64
    """Sequences that have ended and whose pages are kept, while nobody needs them, for prompts that begin alike; with 0
    running sequences share nothing either."""
    kv_dtype: KvDtype = "model"
    """Keys and values: in the model's dtype, or in int8 with a scale per entry and head: about half the bytes of
    bfloat16. The GPU kernel for single tokens does not read it."""
    backend: DecodeBackend = "auto"
    """Decode attention."""
    cuts: bool = True
    """Whether requests may cut the vocabulary (top_k, top_p); without, they are refused and decoding is a little
    faster."""

    def __post_init__(self) -> None:
        for name in ("max_running", "steps", "page_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in (
            "max_length",
            "block_slots",
            "exit_slots",
            "exit_at",
            "prefill_rows",
            "prefill_chunk",
            "block_pages",
            "edge_pages",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive, or None")
        allowed = get_args(KvDtype)
        require(self.kv_dtype in allowed, f"kv_dtype={self.kv_dtype!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("staged", "kept"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name}={value} must not be negative")


@dataclass(frozen=True)
class EngineMesh:
    """Devices that decode."""

    data: int = 1
    """Copies of the engine, each with all weights and caches of its own."""
    tensor: int = 1
    """Devices that share a copy: its heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        for name in ("data", "tensor"):
            require(getattr(self, name) > 0, f"mesh.{name}={getattr(self, name)} must be positive")

    @property
    def devices(self) -> int:
        """Devices of all copies."""
        return self.data * self.tensor


ONE_DEVICE = EngineMesh()

"""Sizes of the engine, and how those left open follow from the others."""

from dataclasses import dataclass

from mor_jax.errors import require
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_state import EngineShape
from mor_jax.infer.paged_attention import DecodeBackend, decode_backend, products_backend


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; None is chosen from the others."""

    max_running: int = 8
    """Sequences decoded at the same time."""
    max_length: int = 2048
    """Tokens of one sequence, prompt and completion."""
    block_slots: int | None = None
    """Tokens that one pass over the block computes; None is two thirds of max_running (all for one pass)."""
    exit_slots: int | None = None
    """Tokens that leave and enter together; None is what block_slots leave of max_running (all for one pass)."""
    exit_at: int | None = None
    """Tokens that make an exit step due; None is exit_slots, 1 runs one in every step."""
    staged: int | None = None
    """Further sequences whose prompt is read ahead; None is a quarter of max_running, at least 2."""
    steps: int = 16
    """Block passes per dispatch."""
    page_size: int = 16
    """Cache entries per page."""
    prefill_rows: int = 4
    """Prompts that are read at a time."""
    prefill_chunk: int = 128
    """Tokens of each that are read at a time."""
    block_pages: int | None = None
    """Pages of the block's pool; None is enough for every sequence at its longest and deepest."""
    edge_pages: int | None = None
    """Pages of the first and last layers' pool; None likewise."""
    backend: DecodeBackend = "auto"
    """Decode attention."""
    products: DecodeBackend = "auto"
    """Matrix products of decoded tokens, with the norms, activations and residuals around them, and sampling."""
    cuts: bool = True
    """Whether requests may cut the vocabulary (top-k, top-p). Without, the device need not ask the host in every exit
    step whether one does, and such requests are refused."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_length", "steps", "page_size", "prefill_rows", "prefill_chunk"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("block_slots", "exit_slots", "exit_at", "block_pages", "edge_pages"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive, or None")
        require(self.staged is None or self.staged >= 0, f"staged={self.staged} must not be negative")


def engine_shape(model: DecodeModel, options: EngineOptions) -> EngineShape:
    """Resolve the options for a model."""
    running, passes = options.max_running, kv_layout(model.config).passes
    block = options.block_slots or (running if passes == 1 else max(1, round(running * 2 / 3)))
    exits = options.exit_slots or (running if passes == 1 else max(1, running - block))
    staged = max(2, running // 4) if options.staged is None else options.staged
    return EngineShape(
        max_running=running,
        block_slots=block,
        exit_slots=exits,
        exit_at=options.exit_at or exits,
        places=running + staged,
        max_length=options.max_length,
        steps=options.steps,
        page_size=options.page_size,
        block_pages=options.block_pages,
        edge_pages=options.edge_pages,
        backend=decode_backend(model.config, options.backend, model.shards),
        products=products_backend(max(block, exits), options.products, model.shards),
        cuts=options.cuts,
    )

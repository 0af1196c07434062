"""The engine's static sizes, resolved for a model and a device (letters: S places, C block slots, E exit slots)."""

from dataclasses import dataclass

from mor_jax.errors import require
from mor_jax.infer.cache import CacheShape, kv_layout
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_options import DecodeBackend, EngineOptions, KvDtype
from mor_jax.infer.paged_attention import decode_backend


@dataclass(frozen=True)
class EngineShape:
    """Static sizes of the engine; nothing recompiles while they stay."""

    max_running: int
    """Sequences decoded at the same time."""
    block_slots: int
    """C: tokens that one pass over the block computes."""
    exit_slots: int
    """E: tokens that leave together through last layer, head, sampling, embedding and first layer."""
    exit_at: int
    """Tokens that make an exit step due; 1 runs one in every step, and no step waits for the host."""
    places: int
    """S: sequences that hold pages: those decoded, and those whose prompt is read and that wait."""
    max_length: int
    """Tokens of one sequence, prompt and completion."""
    steps: int = 16
    """Block passes per dispatch: the host looks in between."""
    page_size: int = 16
    """Cache entries per page."""
    block_pages: int | None = None
    """See ``CacheShape``."""
    edge_pages: int | None = None
    """See ``CacheShape``."""
    kv_dtype: KvDtype = "model"
    """See ``CacheShape``."""
    backend: DecodeBackend = "xla"
    """Decode attention, resolved."""
    cuts: bool = True
    """Whether requests may cut the vocabulary."""
    kept: int = 0
    """See ``CacheShape``."""

    def __post_init__(self) -> None:
        for name in ("max_running", "block_slots", "exit_slots", "exit_at", "max_length", "steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.places >= self.max_running, f"places={self.places} is fewer than max_running={self.max_running}")

    @property
    def starves_below(self) -> int:
        """Tokens between passes below which an exit step is due too: the block would have free slots."""
        return max(1, min(self.block_slots, self.max_running - self.exit_at))

    @property
    def cache(self) -> CacheShape:
        """Sizes of the cache."""
        return CacheShape(
            sequences=self.places,
            max_length=self.max_length,
            page_size=self.page_size,
            block_pages=self.block_pages,
            edge_pages=self.edge_pages,
            kept=self.kept,
            kv_dtype=self.kv_dtype,
        )


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
        max_length=options.max_length or model.config.context_length,
        steps=options.steps,
        page_size=options.page_size,
        block_pages=options.block_pages,
        edge_pages=options.edge_pages,
        kv_dtype=options.kv_dtype,
        backend=decode_backend(model.config, options.backend, model.shards, options.kv_dtype),
        cuts=options.cuts,
        kept=options.kept,
    )

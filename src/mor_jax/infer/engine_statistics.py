"""What an engine counts."""

from dataclasses import dataclass, field

from mor_jax.infer.cache import KvUsage


@dataclass
class EngineStatistics:
    """Sums since ``Engine.reset_statistics``."""

    tokens: int = 0
    dispatches: int = 0
    prefills: int = 0
    prompt_tokens: int = 0
    """Read; those found are none of them."""
    found_tokens: int = 0
    """Taken over from other sequences instead."""
    found_prefixes: int = 0
    """Times that a request took over some; one that lost its place may do so again."""
    preemptions: int = 0
    """Times that a sequence lost its place, to be read again."""
    block_steps: int = 0
    block_used: int = 0
    block_entries: int = 0
    exit_steps: int = 0
    exit_used: int = 0
    exit_entries: int = 0
    peak: KvUsage = field(default_factory=lambda: KvUsage(0, 0, 0))
    """Largest use of the caches at the times when ``measure`` looked."""

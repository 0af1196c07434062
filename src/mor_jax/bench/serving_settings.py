"""What ``mor bench serve`` is asked for; needs no jax, so that the command can parse it at once."""

from dataclasses import dataclass, field
from typing import Literal

from mor_jax.errors import require
from mor_jax.infer.engine_options import EngineMesh, KvDtype

Match = Literal["slots", "memory"]


@dataclass(frozen=True)
class ServeSettings:
    """What every model is measured with."""

    batches: tuple[int, ...] = (32,)
    """Sequences in flight of the first model, and its block slots, on every copy (mesh.data): one scenario each."""
    matches: tuple[Match, ...] = ("slots",)
    """How the others are matched with it, one scenario each.

    `slots`: every model has as many block slots, and as many sequences in flight as fill them; `memory`: as many
    sequences as parameters and keys and values reserved take the first model's bytes."""
    requests: int = 1000
    """Requests in the queue at the start."""
    mean_length: float = 256.0
    """Of the normal distribution of output lengths."""
    std_length: float = 64.0
    """Its standard deviation (the paper does not give one)."""
    prompt_length: int = 1
    """Tokens of every prompt; 1 is the paper's setting without a prefix."""
    reserve: int = 512
    """Positions that a sequence's memory is reckoned for; also the longest completion."""
    temperature: float = 100.0
    """Of the draws; 100 makes them as uniform as the tokens that routers are calibrated on."""
    exit_factor: float = 2.0
    """`slots`: exit slots of a model with several passes, over its block slots."""
    exit_headroom: float = 1.2
    """`memory`: exit slots of a model with several passes, over the tokens that leave after a pass on average."""
    steps: int = 32
    """Block passes per dispatch."""
    page_size: int = 16
    """Cache entries per page."""
    kv_dtype: KvDtype = "model"
    """Keys and values of every model, in its dtype or in int8."""
    profile: bool = False
    """Whether to trace one busy dispatch of every scenario and list its kernels."""
    calibration_rows: int = 128
    """Rows of 256 random tokens that routers are calibrated on (scores of a random model hardly differ in a row)."""
    seed: int = 0
    """Of weights, prompts and lengths."""
    mesh: EngineMesh = field(default_factory=EngineMesh)

    def __post_init__(self) -> None:
        for match in self.matches:
            require(match in ("slots", "memory"), f"matches={match!r} is not one of 'slots', 'memory'")
        require(min(self.batches, default=0) > 0, f"batches={self.batches} must be positive")
        for name in ("requests", "mean_length", "prompt_length", "reserve", "steps", "page_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(
            not self.profile or self.mesh.devices == 1,
            f"profile=True tells the kernels of one device, not of mesh.data={self.mesh.data} x "
            f"mesh.tensor={self.mesh.tensor}",
        )

"""What the serving benchmark measures: models with random weights, engine sizes per scenario, a queue of requests."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import presets
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError, require
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.calibrate import calibrate_boundaries
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.paged_attention import DecodeBackend
from mor_jax.infer.replicas import EngineMesh
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import Sampling
from mor_jax.mesh.mesh import on_mesh
from mor_jax.model.flops import kv_bytes_per_token
from mor_jax.model.transformer import init_params

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
    products: DecodeBackend = "auto"
    """Matrix products of decoded tokens."""
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


def parse_model(text: str) -> ModelConfig:
    """Read ``PRESET[@LAYERS]``, such as vanilla-360m@34.

    Raises:
        UserError: an unknown preset, or layers that are no number.
    """
    name, at, layers = text.partition("@")
    model = presets.get(name).config.model
    if not at:
        return model
    if not layers.isdecimal():
        raise UserError(f"model {text!r}: {layers!r} is not a number of layers")
    return dataclasses.replace(model, num_layers=int(layers))


def random_model(config: ModelConfig, settings: ServeSettings) -> tuple[tuple[DecodeModel, ...], dict[str, Any]]:
    """Make a model with random weights, its router calibrated, on the devices of every copy, and say so."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(settings.seed))
    meshes = settings.mesh.per_copy()
    note: dict[str, Any] = {"weights": "random (initialisation)"}
    boundaries = None
    if config.routing.kind == "expert":
        rng, shape = np.random.default_rng(settings.seed), (settings.calibration_rows, 256)
        tokens_BT = rng.integers(0, config.vocab_size, shape).astype(np.int32)
        with on_mesh(meshes[0]):
            found = calibrate_boundaries(prepare_weights(config, params, mesh=meshes[0]), tokens_BT)
        boundaries = found.boundaries
        note["router"] = "untrained: boundaries calibrated to the training capacities on random tokens"
        note |= {"boundaries": boundaries, "calibrated_shares": found.shares}
    models = tuple(prepare_weights(config, params, boundaries=boundaries, mesh=mesh) for mesh in meshes)
    return jax.block_until_ready(models), note


def parameter_bytes(model: DecodeModel) -> int:
    """Bytes of the weights of one copy."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


@dataclass(frozen=True)
class Scenario:
    """How one model's engine is sized; every copy of it alike."""

    match: Match
    batch: int
    """Of the first model."""
    budget: float | None
    """Bytes of parameters and reserved keys and values that the first model takes; None for the first itself."""


def bytes_per_position(config: ModelConfig) -> float:
    """Bytes of keys and values per position of the text, at the training capacities."""
    return kv_bytes_per_token(config, bytes_per_value=jnp.dtype(config.dtype).itemsize)


def options_for(model: DecodeModel, settings: ServeSettings, scenario: Scenario) -> EngineOptions:
    """Choose the engine's sizes for a scenario.

    Raises:
        UserError: the model's parameters alone exceed the budget.
    """
    batch, layout = scenario.batch, kv_layout(model.config)
    per_sequence = bytes_per_position(model.config) * settings.reserve
    pages = -(-settings.reserve // settings.page_size)
    if layout.passes == 1:
        block = exits = exit_at = running = batch
    elif scenario.match == "slots":
        # the block's slots stay full while up to `exits` tokens gather behind them
        exits = exit_at = max(1, round(batch * settings.exit_factor))
        block, running = batch, batch + exits
    else:
        # a pass costs about the same however full it is: all may go at once, and those that are through leave in the
        # same step, so that the block's slots stay full and no step waits for a decision of the host
        budget = scenario.budget
        running = batch if budget is None else int((budget - parameter_bytes(model)) // per_sequence)
        require(running > 0, f"the parameters alone ({parameter_bytes(model)} bytes) exceed the budget of {budget}")
        block, exit_at = running, 1
        leaving = settings.exit_headroom * running / sum(model.config.capacities)
        exits = min(running, 16 * math.ceil(leaving / 16))
    groups = 1 if layout.groups == 1 else sum(model.config.capacities)
    return EngineOptions(
        max_running=running,
        max_length=settings.prompt_length + settings.reserve,
        block_slots=block,
        exit_slots=exits,
        exit_at=exit_at,
        steps=settings.steps,
        page_size=settings.page_size,
        prefill_chunk=min(256, max(1, settings.prompt_length - 1)),
        block_pages=math.ceil(running * pages * groups),
        edge_pages=running * pages,
        products=settings.products,
        cuts=False,
    )


def make_requests(config: ModelConfig, settings: ServeSettings) -> list[Request]:
    """Draw the queue: the same lengths for every model of a vocabulary."""
    rng = np.random.default_rng(settings.seed)
    lengths = np.clip(
        rng.normal(settings.mean_length, settings.std_length, settings.requests).round(), 1, settings.reserve
    )
    prompts = rng.integers(0, config.vocab_size, (settings.requests, settings.prompt_length))
    return [
        Request(tuple(prompt.tolist()), int(length), Sampling(temperature=settings.temperature, seed=index))
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]

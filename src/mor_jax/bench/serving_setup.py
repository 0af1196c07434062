"""What the serving benchmark measures: models with random weights, engine sizes per scenario, a queue of requests."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mor_jax import presets
from mor_jax.array_types import Params
from mor_jax.bench.serving_settings import Match, ServeSettings
from mor_jax.config import Config, ModelConfig, PerfConfig
from mor_jax.errors import UserError, require
from mor_jax.evaluate.calibrate import calibrate, with_boundaries
from mor_jax.evaluate.passes import batch_trace, evaluation_perf
from mor_jax.infer.cache import entry_bytes, kv_layout
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine_options import EngineOptions, KvDtype
from mor_jax.infer.replicas import copy_meshes
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import Sampling
from mor_jax.model.flops import kv_bytes_per_token
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import init_params

_CALIBRATION_LENGTH, _CALIBRATION_ROWS = 256, 16
"""Tokens of a row, and rows of a batch."""


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
    note: dict[str, Any] = {"weights": "random (initialisation)"}
    boundaries = None
    if config.routing.kind == "expert":
        boundaries, shares = _calibrate(config, params, settings)
        note["router"] = "untrained: boundaries calibrated to the training capacities on random tokens"
        note |= {"boundaries": boundaries, "calibrated_shares": shares}
    meshes = copy_meshes(settings.mesh)
    models = tuple(prepare_weights(config, params, boundaries=boundaries, mesh=mesh) for mesh in meshes)
    return jax.block_until_ready(models), note


def _calibrate(
    model: ModelConfig, params: Params, settings: ServeSettings
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Boundaries from random tokens, and the shares of these that complete each recursion with them."""
    rng = np.random.default_rng(settings.seed)
    shape = (settings.calibration_rows, _CALIBRATION_LENGTH + 1)  # the last token of a row is a target only
    tokens_BT = rng.integers(0, model.vocab_size, shape).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    whole = {"tokens": tokens_BT, "segment_ids": np.ones(shape, np.int32), "positions": positions_BT}
    pieces = range(0, len(tokens_BT), _CALIBRATION_ROWS)
    batches = [{name: x[first : first + _CALIBRATION_ROWS] for name, x in whole.items()} for first in pieces]
    perf, key = PerfConfig(), jax.random.key(settings.seed)
    boundaries = calibrate(Weights(model, params), perf, batches)
    weights = Weights(with_boundaries(Config(model=model), boundaries).model, params)
    rows = (Rows.of_batch(batch) for batch in batches)
    traces = [batch_trace(weights, evaluation_perf(perf), "threshold", piece, key) for piece in rows]
    depth_BT = np.concatenate([trace.depth_BT for trace in traces if trace is not None])
    return boundaries, tuple(float(np.mean(depth_BT > r)) for r in range(len(boundaries)))


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


def bytes_per_position(config: ModelConfig, kv_dtype: KvDtype) -> float:
    """Bytes of keys and values per position of the text, at the training capacities."""
    per_value = entry_bytes(config, kv_dtype) / (2 * config.num_kv_heads * config.head_dim)
    return kv_bytes_per_token(config, bytes_per_value=1) * per_value


def options_for(model: DecodeModel, settings: ServeSettings, scenario: Scenario) -> EngineOptions:
    """Choose the engine's sizes for a scenario.

    Raises:
        UserError: the model's parameters alone exceed the budget.
    """
    batch, layout = scenario.batch, kv_layout(model.config)
    per_sequence = bytes_per_position(model.config, settings.kv_dtype) * settings.reserve
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
        kv_dtype=settings.kv_dtype,
        cuts=False,
        kept=0,  # no prompt of the queue begins like another
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

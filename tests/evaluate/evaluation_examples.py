"""A tiny model and held-out rows for the evaluation tests."""

from functools import cache
from typing import Any

import jax
import numpy as np

from mor_jax.config import Config, ModelConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.config import OptimizerConfig as Optimizer
from mor_jax.model.parameters import Weights
from mor_jax.model.transformer import init_params

T = 16
TEXT = "The router sends some bytes deeper than others; naïve ones \u2014 never. <b>&amp;</b>\n\tEnd."


class Bytes:
    """Byte tokenizer: 0 to 255 are bytes, 256 ends a document."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class HeldOut:
    """Fixed batches with their tokenizer."""

    def __init__(self, *batches: Any) -> None:
        self.tokenizer = Bytes()
        self.batches = batches

    @property
    def steps(self) -> int:
        return len(self.batches)

    def batch(self, step: int) -> Any:
        return self.batches[step]


def batch(seed: int, rows: int = 2, padding: int = 0) -> dict[str, np.ndarray]:
    """Two documents in every row, the last ``padding`` tokens padding."""
    tokens = np.random.default_rng(seed).integers(0, 256, (rows, T + 1)).astype(np.int32)
    tokens[:, 6] = 256
    segments = np.where(np.arange(T + 1) <= 6, 1, 2) * (np.arange(T + 1) < T + 1 - padding)
    positions = np.where(np.arange(T + 1) <= 6, np.arange(T + 1), np.arange(T + 1) - 7)
    return {
        "tokens": tokens,
        "segment_ids": np.tile(segments, (rows, 1)).astype(np.int32),
        "positions": np.tile(positions, (rows, 1)).astype(np.int32),
    }


def config(
    kind: str = "expert",
    *,
    sharing: str = "cycle",
    across: bool = True,
    num_recursions: int = 2,
    num_layers: int = 2,
    **routing: Any,
) -> Config:
    """A model of one shared layer, applied twice by default."""
    count = 1 if sharing == "none" else num_recursions
    recursion = RecursionConfig(num_recursions=count, sharing=sharing)  # type: ignore[arg-type]
    if kind == "token":
        routing = {"score": "softmax", "alpha": 1.0, **routing}
    model = ModelConfig(
        vocab_size=260,
        num_layers=max(num_layers, count),
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=32,
        context_length=T,
        dtype="float32",
        init_std=0.3,
        attend_across_documents=across,
        recursion=recursion,
        routing=RoutingConfig(kind=kind, **routing),  # type: ignore[arg-type]
    )
    train = TrainConfig(steps=10, batch_size=2, eval_rows=4)
    return Config(preset="tiny", model=model, train=train, optimizer=Optimizer(warmup_steps=1))


@cache
def params(config: Config) -> Any:
    """Fresh parameters."""
    return jax.jit(lambda: init_params(config.model, jax.random.key(0)))()


def weights(config: Config, router_bias_R: Any = None) -> Weights:
    """A model of ``params``."""
    return Weights(config.model, params(config), router_bias_R)

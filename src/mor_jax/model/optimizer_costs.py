"""What the optimiser takes: moments, and the work of Muon's orthogonalisation. By arithmetic, without JAX.

Its FLOPs are no part of ``flops.train_flops``: models are compared by what they compute of their tokens, and the
optimiser's share falls with the batch. One multiply-add is 2 FLOPs; everything is float32. Letters: D model width, X
the other side of a matrix (query heads, key/value heads or feed-forward), m the lesser of the two and n the greater.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mor_jax.config import Config, LoraTarget, ModelConfig
from mor_jax.model.flops import count_parameters
from mor_jax.model.weight_axes import weight_axes, widths

_WIDTH = 4
_STEPS = 5
"""Iterations of Newton-Schulz in ``optax.contrib.scale_by_muon``."""
ONE_DEVICE: Mapping[str, int] = dict.fromkeys(("slice", "data", "fsdp", "context", "tensor"), 1)


@dataclass(frozen=True)
class OptimizerCosts:
    """One optimiser step on one device; what is counted twice over a mesh is what it does twice."""

    flops: float
    """Matrix products; AdamW makes none."""
    traffic: float
    """Bytes between memory and core: gradients read, parameters and moments read and written, and the operands of the
    products once each way."""
    received: float
    """Bytes from other devices of its slice, beside the gradients that every optimiser needs."""


def layer_matrices(model: ModelConfig) -> Counter[int]:
    """Count the matrices of all layers by X; the two of a fused weight are two."""
    layers = model.block_depth + (2 if model.recursion.has_middle else 0)
    found: Counter[int] = Counter()
    for weight in get_args(LoraTarget):
        inputs, outputs = weight_axes(model, weight)
        fused = outputs.get(None, 1)
        found[widths(model, weight)[0 if "embed" in outputs else 1] // fused] += layers * fused
        assert ("embed" in inputs) != ("embed" in outputs)
    return found


def moment_values(config: Config) -> int:
    """Count what the optimiser remembers: two values per parameter, one for those in Muon's matrices."""
    values = 2 * count_parameters(config.model).total
    if config.optimizer.kind == "muon":
        values -= sum(count * config.model.d_model * x for x, count in layer_matrices(config.model).items())
    return values


def optimizer_costs(config: Config, sizes: Mapping[str, int] = ONE_DEVICE) -> OptimizerCosts:
    """Count what one step of ``config.optimizer`` takes of one device.

    An iteration of Newton-Schulz on X [m, n] is A = X X^T, A A, and their polynomial times X: 4 m^2 n + 2 m^3 FLOPs,
    and 3 m n + 5 m^2 values between memory and core. How ``runs.muon`` spreads matrices over devices is counted as it
    is: in whole matrices, moved by an all-to-all each way and, between replicas, an all-reduce.

    Args:
        config: model and optimiser.
        sizes: devices per mesh axis.
    """
    fsdp, tensor, replicas = sizes["fsdp"], sizes["tensor"], sizes["data"] * sizes["context"]
    shards, d = fsdp * tensor, config.model.d_model
    parameters = count_parameters(config.model).total
    flops, received, traffic = 0.0, 0.0, _WIDTH * (3.0 * parameters + 2 * moment_values(config)) / shards
    if config.optimizer.kind == "muon":
        for x, count in layer_matrices(config.model).items():
            m, n = sorted((d, x))
            each = -(-count // shards)
            mine = -(-each // replicas)
            flops += mine * _STEPS * (4.0 * m**2 * n + 2.0 * m**3)
            traffic += _WIDTH * mine * _STEPS * (3.0 * m * n + 5.0 * m**2)
            exchanged = 2 * mine * ((fsdp - 1) / fsdp + (tensor - 1) / tensor)
            received += _WIDTH * d * x * (exchanged + 2 * each * (replicas - 1) / replicas)
    return OptimizerCosts(flops, traffic, received)

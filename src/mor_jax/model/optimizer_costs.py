"""What the optimiser costs: moments, and the matrix products of Muon's orthogonalisation. By arithmetic, without JAX.

These FLOPs are no part of ``flops.train_flops``: models are compared by what they compute of their tokens, and the
optimiser's share falls with the batch. One multiply-add is 2 FLOPs.
"""

from collections import Counter
from dataclasses import dataclass
from typing import get_args

from mor_jax.config import Config, LoraTarget, ModelConfig
from mor_jax.model.flops import count_parameters
from mor_jax.model.weight_axes import weight_axes, widths

NEWTON_SCHULZ_STEPS = 5
"""Iterations of ``optax.contrib.scale_by_muon``."""


@dataclass(frozen=True)
class OptimizerCosts:
    """One optimiser step, over the whole model; bytes are those of float32."""

    moments: int
    """Values that are kept between steps: two per parameter, one per parameter of Muon's matrices."""
    flops: float
    """Matrix products; AdamW makes none."""
    traffic: float
    """Bytes between memory and core: gradients read, parameters and moments read and written, and the products'
    operands once each way."""


def layer_matrices(model: ModelConfig) -> Counter[tuple[int, int]]:
    """Count the matrices of all layers by (rows, columns), the lesser first; the two of a fused weight are two."""
    layers = model.block_depth + (2 if model.recursion.has_middle else 0)
    found: Counter[tuple[int, int]] = Counter()
    for weight in get_args(LoraTarget):
        inputs, outputs = widths(model, weight)
        fused = weight_axes(model, weight)[1].get(None, 1)
        rows, columns = sorted((inputs, outputs // fused))
        found[rows, columns] += layers * fused
    return found


def optimizer_costs(config: Config) -> OptimizerCosts:
    """Count what one step of ``config.optimizer`` takes.

    An iteration of Newton-Schulz on an m x n matrix X (m <= n) is A = X X^T, A A and their polynomial's product by X:
    4 m^2 n + 2 m^3 FLOPs, and 3 m n + 5 m^2 values between memory and core.
    """
    parameters = count_parameters(config.model).total
    moments, flops, values = 2 * parameters, 0.0, 0.0
    if config.optimizer.kind == "muon":
        for (m, n), count in layer_matrices(config.model).items():
            moments -= count * m * n
            flops += count * NEWTON_SCHULZ_STEPS * (4.0 * m**2 * n + 2.0 * m**3)
            values += count * NEWTON_SCHULZ_STEPS * (3.0 * m * n + 5.0 * m**2)
    return OptimizerCosts(moments, flops, 4.0 * (3 * parameters + 2 * moments + values))

"""How long the model's matrix products take at best on one device: it does not grow with what a program wastes.

Forward and backward, no recomputation: of every product the larger of its time in the matrix units, sizes filled up to
their tiles, and the time of its inputs and outputs, moved once; then the optimiser's bytes. Low-rank updates are not
counted. Letters: D model, F feed-forward, N query heads, K key/value heads, H head dim, V vocabulary, C tokens
computed, S keys.
"""

from collections.abc import Mapping

from mor_jax.config import Config
from mor_jax.model.flops import LayerPass, forward_flops, layer_passes
from mor_jax.model.optimizer_costs import optimizer_costs
from mor_jax.plan.memory import tokens_per_device
from mor_jax.plan.topology import Generation

_ROWS = 8
"""Rows of a register: what is streamed past a tile is filled up to them."""
_TILES = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}
"""Sides of a generation's matrix units."""


def attainable_seconds(config: Config, sizes: Mapping[str, int], generation: Generation) -> dict[str, float]:
    """Seconds of one step by part: `block`, `attention`, `head`, `router` and `optimiser`.

    Args:
        config: model, batch and perf.
        sizes: devices per mesh axis.
        generation: of the devices.
    """
    model, tensor = config.model, sizes["tensor"]
    length, execution = model.context_length, config.perf.execution
    rows = tokens_per_device(config, sizes) / length
    device = _Device(generation, 2 if model.dtype == "bfloat16" else 4)
    d, heads, kv = model.d_model, model.num_heads * model.head_dim // tensor, model.num_kv_heads * model.head_dim
    f = model.d_ff // tensor
    passes = layer_passes(model, length, execution)
    block = 0.0
    for p in passes:
        tokens = rows * p.computed
        each = [(tokens, d, heads), (tokens, heads, d), (tokens, d, 2 * f), (tokens, f, d)]
        if p.projected:
            each.append((rows * p.projected, d, 2 * kv // tensor))
        block += p.layers * sum(device.trained(*of) for of in each)
    routed = forward_flops(model, length, execution=execution)["router"] * rows / (2 * d)
    parts = {
        "block": block,
        "attention": sum(p.layers * _attention(config, p, rows, tensor, device) for p in passes),
        "head": device.trained(rows * length, d, model.vocab_size // tensor),
        "router": 3 * device.moved(routed * d),
    }
    seconds = {name: config.train.accumulation * value for name, value in parts.items()}
    return {**seconds, "optimiser": optimizer_costs(config, sizes).traffic / generation.chip.hbm_rate}


def _attention(config: Config, p: LayerPass, rows: float, tensor: int, device: "_Device") -> float:
    """Two products forward and four backward over the pairs that causality lets through; scores are never moved."""
    model, c, s, h = config.model, p.computed, p.keys, config.model.head_dim
    heads, kv = model.num_heads / tensor, model.num_kv_heads / tensor
    pairs = rows * heads * (s + 1) / (2 * s)
    queries, keys = rows * heads * c * h, 2 * rows * kv * s * h
    forward = max(pairs * (device.product(c, h, s) + device.product(c, s, h)), device.moved(2 * queries + keys))
    gradients = 2 * (device.product(s, c, h)) + device.product(c, h, s) + device.product(c, s, h)
    return forward + max(pairs * gradients, device.moved(4 * queries + 2 * keys))


class _Device:
    """Times of one device: its matrix units' and its memory's."""

    def __init__(self, generation: Generation, width: int) -> None:
        self.chip, self.width, self.tile = generation.chip, width, _TILES[generation.name]

    def moved(self, values: float) -> float:
        """Seconds to move so many values of the compute dtype."""
        return values * self.width / self.chip.hbm_rate

    def product(self, m: float, k: float, n: float) -> float:
        """Seconds of [m, k] times [k, n] in the matrix units, whichever side stays in them."""
        held = min(
            _filled(n, self.tile) * _filled(m, _ROWS),
            _filled(m, self.tile) * _filled(n, _ROWS),
        )
        return 2 * held * _filled(k, self.tile) / self.chip.flops

    def trained(self, m: float, k: float, n: float) -> float:
        """Seconds of a product and of its two gradients, each bound by arithmetic or by memory."""
        moved = self.moved(m * k + k * n + m * n)
        return sum(max(self.product(*of), moved) for of in ((m, k, n), (m, n, k), (k, m, n)))


def _filled(size: float, tile: int) -> float:
    return -(-size // tile) * tile

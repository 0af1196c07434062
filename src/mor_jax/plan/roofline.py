"""How long a train step takes at least: arithmetic, memory and network at their peaks, perfectly overlapped.

The result is a bound labelled as an estimate, no forecast: no program reaches the peaks, and nothing here was measured.
Letters: D model, F feed-forward, N query heads, K key/value heads, H head dim, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mor_jax.config import Config, ModelConfig, RematPolicy
from mor_jax.model.flops import layer_passes, train_flops, train_flops_per_token
from mor_jax.model.optimizer_costs import optimizer_costs
from mor_jax.plan.memory import tokens_per_device
from mor_jax.plan.topology import Generation


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimiser step, over all devices; one multiply-add is 2."""

    model: float
    """Exact count, causal attention, nothing computed twice: what MFU is measured by."""
    executed: float
    """With what rematerialisation and the attention's backward pass compute again."""
    per_token: float
    """``model`` per token."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step at peak rates, per device, and the bound that follows."""

    arithmetic: float
    memory: float
    network: float
    """Between the devices of a slice."""
    network_across: float
    """Between slices."""
    tokens_per_second: float
    """Bound of all devices together, everything overlapped."""
    mfu: float
    """Bound on the model's FLOPs per second over the peak."""

    @property
    def seconds(self) -> float:
        """The longest of the four."""
        return max(self.arithmetic, self.memory, self.network, self.network_across)

    @property
    def serial(self) -> float:
        """All four, one after the other: tells apart what the longest alone does not."""
        return self.arithmetic + self.memory + self.network + self.network_across

    @property
    def limit(self) -> str:
        """Which of the four is longest."""
        times = ("arithmetic", "memory", "network", "network_across")
        return max(times, key=lambda name: getattr(self, name)).replace("_", " ")


def block_again(model: ModelConfig, remat: RematPolicy) -> float:
    """Share of the block's matrix products that the backward pass makes again."""
    d, heads, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = 2 * d * (heads + kv) + 3 * d * model.d_ff
    again = {"full": layer, "attention": layer, "projections": layer - d * (heads + 2 * kv), "names": d * heads}
    return again.get(remat, 0) / layer


def step_flops(config: Config, *, fused_attention: bool = True) -> StepFlops:
    """Count the FLOPs of one optimiser step.

    Args:
        config: model, batch and perf.
        fused_attention: whether a kernel skips what causality hides; the plain one computes it.
    """
    model, rows = config.model, config.train.batch_size
    execution, remat = config.perf.execution, config.perf.resolved().remat
    parts = train_flops(model, execution=execution, attention="flash" if fused_attention else "full")
    factors = {name: 3.5 if name == "attention" and fused_attention else 3.0 for name in parts}
    shares = {"block": block_again(model, remat), "router": float(remat == "full")}
    kept = remat == "none" or (fused_attention and remat in ("names", "projections", "attention"))
    shares["attention"] = 0.0 if kept else 1.0
    again = sum(share * parts[name] / factors[name] for name, share in shares.items() if name in parts)
    per_token = train_flops_per_token(model)
    return StepFlops(
        model=per_token * rows * model.context_length,
        executed=rows * (sum(parts.values()) + again),
        per_token=per_token,
    )


def memory_traffic(config: Config, sizes: Mapping[str, int]) -> float:
    """Count the bytes between memory and core of one device and step: every product's operands once each way.

    The optimiser moves what ``optimizer_costs`` says, and weights are read per application and pass; of a layer count
    its input, queries, keys, values, attention and feed-forward, written and read once forward, and twice as much
    backward; of the head the logits and their gradients. Fusions that keep values on the chip move less, most programs
    more.

    Args:
        config: model, batch and perf.
        sizes: devices per mesh axis.
    """
    model, tensor = config.model, sizes["tensor"]
    width = 2 if model.dtype == "bfloat16" else 4
    passes = layer_passes(model, model.context_length, config.perf.execution)
    again = block_again(model, config.perf.resolved().remat)
    d, f = model.d_model, model.d_ff
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer_weights = 2 * d * (heads + kv) + 3 * d * f
    weights = sum(p.layers for p in passes) * layer_weights / tensor * width * (2 + again)
    tokens = tokens_per_device(config, sizes)
    share = tokens / model.context_length
    values = 2 * d + (2 * heads + 2 * kv + 3 * f) / tensor
    activations = sum(p.layers * p.computed for p in passes) * share * values * width * 2 * (3 + again)
    logits = tokens * model.vocab_size / tensor * 2 * (4 + width)
    return config.train.accumulation * (weights + activations + logits) + optimizer_costs(config, sizes).traffic


def roofline(
    config: Config,
    sizes: Mapping[str, int],
    generation: Generation,
    received: tuple[float, float],
    *,
    fused_attention: bool = True,
) -> Roofline:
    """Divide work by peak rates.

    Args:
        config: of the step.
        sizes: devices per mesh axis.
        generation: rates of a device.
        received: bytes that a device receives per step (within its slice, from other slices).
        fused_attention: as of ``step_flops``.
    """
    devices, flops = math.prod(sizes.values()), step_flops(config, fused_attention=fused_attention)
    executed = flops.executed / devices + optimizer_costs(config, sizes).flops
    times = {
        "arithmetic": executed / generation.chip.flops,
        "memory": memory_traffic(config, sizes) / generation.chip.hbm_rate,
        "network": received[0] / generation.ici_rate,
        "network_across": received[1] / generation.dcn_rate,
    }
    seconds = max(times.values())
    tokens = config.train.batch_size * config.model.context_length
    return Roofline(
        **times,
        tokens_per_second=tokens / seconds,
        mfu=flops.model / seconds / devices / generation.chip.flops,
    )


def estimate_received(config: Config, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Estimate the bytes that a device receives per step, for ranking meshes before compiling.

    Per micro-batch: `fsdp` gathers the weights of every layer application forward and backward (a repeated block's
    once, unless ``perf.whole_block`` is off; with it and rematerialisation the last layer's once), every axis of rows
    sums the gradient of every layer application, and `tensor` sums the output of attention and feed-forward both ways.
    Per step, what the optimiser exchanges.

    Args:
        config: model, batch and perf.
        sizes: devices per mesh axis.

    Returns:
        (within the slice, from other slices).
    """
    model, recursion = config.model, config.model.recursion
    width = 2 if model.dtype == "bfloat16" else 4
    passes = layer_passes(model, model.context_length, config.perf.execution)
    applications = sum(p.layers for p in passes)
    once = recursion.repeats_block and config.perf.resolved().whole_block
    gathers = 2 * applications - (model.block_depth * (2 * recursion.num_recursions - 1) if once else 0)
    if once and recursion.has_middle and config.perf.remat != "none":
        gathers -= 1  # the last layer's
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer_weights = 2 * model.d_model * (heads + kv) + 3 * model.d_model * model.d_ff
    embeddings = 2 * model.vocab_size * model.d_model
    share = lambda axis: (sizes[axis] - 1) / sizes[axis]  # noqa: E731
    gathered, summed = ((n * layer_weights + embeddings) * width / sizes["tensor"] for n in (gathers, applications))
    computed = sum(p.layers * p.computed for p in passes) * tokens_per_device(config, sizes) / model.context_length
    tensor = 4 * computed * model.d_model * width * 2 * share("tensor")
    data, across = (2 * summed / sizes["fsdp"] * share(axis) for axis in ("data", "slice"))
    on_slice = (gathered + summed) * share("fsdp") + tensor + data
    optimizer = optimizer_costs(config, sizes).received
    return on_slice * config.train.accumulation + optimizer, across * config.train.accumulation

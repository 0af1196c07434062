"""Memory of one device: what the compiler allots by kind, and an estimate that needs no compiler.

Letters: D model, F feed-forward, N query heads, K key/value heads, H head dim, V vocabulary, T positions.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mor_jax.config import Config, ModelConfig
from mor_jax.model.flops import block_parameters, count_parameters, layer_passes
from mor_jax.model.optimizer_costs import moment_values
from mor_jax.perf import kept_values
from mor_jax.runs.state import TrainState

_FLOAT32 = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device's memory during a train step, as the compiler allots them."""

    parameters: int
    """Its share of the float32 weights."""
    optimiser: int
    """Its share of the optimiser's moments, and the small rest of the train state."""
    batch: int
    """Its rows, and the padding of all arguments to the chip's tiles."""
    activations: int
    """Temporaries at their peak: kept activations, gradients, gathered weights, workspace."""
    code: int
    """The program."""
    limit: float
    """What programs may use."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimiser + self.batch + self.activations + self.code


def measure_memory(state: TrainState, analysis: Any, limit: float) -> DeviceMemory:
    """Split what ``compiled.memory_analysis()`` states by kind.

    Args:
        state: abstract train state with shardings; donated to the program.
        analysis: of the compiled train step.
        limit: bytes that programs may use.
    """
    parameters = _shard_bytes(state.params)
    others = _shard_bytes(state) - parameters
    outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return DeviceMemory(
        parameters=parameters,
        optimiser=others,
        batch=max(0, analysis.argument_size_in_bytes - parameters - others),
        activations=analysis.temp_size_in_bytes + outputs,
        code=analysis.generated_code_size_in_bytes,
        limit=limit,
    )


def _shard_bytes(tree: Any) -> int:
    def of_leaf(leaf: Any) -> int:
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        keys = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return size * (8 if keys else leaf.dtype.itemsize)  # a typed random key is two words

    return sum(of_leaf(leaf) for leaf in jax.tree.leaves(tree))


@functools.cache
def parameter_total(model: ModelConfig) -> int:
    """All parameters; counted once per model, since a search asks a thousand times."""
    return count_parameters(model).total


def tokens_per_device(config: Config, sizes: Mapping[str, int]) -> int:
    """Tokens of one micro-batch that a device computes.

    Args:
        config: batch, accumulation and context length.
        sizes: devices per mesh axis.
    """
    shards = math.prod(size for axis, size in sizes.items() if axis not in ("tensor",))
    return config.train.batch_size // config.train.accumulation * config.model.context_length // shards


def estimate_bytes(config: Config, sizes: Mapping[str, int]) -> float:
    """Estimate the memory of one device without compiling; good to about a quarter, for pruning and for advice.

    Args:
        config: model, batch and perf.
        sizes: devices per mesh axis.
    """
    model, perf, tensor = config.model, config.perf.resolved(), sizes["tensor"]
    width = 2 if model.dtype == "bfloat16" else 4
    tokens = tokens_per_device(config, sizes)
    rows = tokens / model.context_length
    shards, parameters = sizes["fsdp"] * tensor, parameter_total(model)
    state = (parameters + moment_values(config)) / shards * _FLOAT32
    gradients = parameters / shards * _FLOAT32 * (2 if config.train.accumulation > 1 else 1)
    head = model.vocab_size * model.d_model / tensor * (_FLOAT32 + width)
    applied = sum(p.layers * p.computed for p in layer_passes(model, model.context_length, perf.execution))
    kept = applied * rows * kept_values(model, perf.remat) * width
    once = model.recursion.repeats_block and perf.whole_block and sizes["fsdp"] > 1
    whole = block_parameters(model) * width / tensor if once else 0
    one_layer = tokens * kept_values(model, "none") * width * 2  # made again, and its gradients
    logits = tokens / model.context_length * perf.loss_chunk * model.vocab_size / tensor * (_FLOAT32 + width)
    return state + gradients + head + kept / (tensor if perf.remat != "full" else 1) + one_layer + logits + whole

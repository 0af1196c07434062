"""Compile the engine's programs for one TPU chip that need not be there: a dispatch, and a chunk of prompts.

The engine planned is that of one chip, and every chip of a slice can run one of its own; engines that several chips
share are not planned. All figures are of one chip. Letters: R recursions, T tokens that a sequence holds.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from mor_jax.config import Config, ModelConfig
from mor_jax.errors import require
from mor_jax.infer.cache import entry_bytes, kv_layout
from mor_jax.infer.decode_model import DecodeModel, decoding_refusal, prepare_weights
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import EngineShape, engine_shape
from mor_jax.infer.engine_state import EngineState, empty_control, init_state
from mor_jax.infer.paged_attention import PROMPT_BLOCK, TOKEN_BLOCK
from mor_jax.infer.prefill import prefill
from mor_jax.infer.prefill_chunk import with_prefill_sizes
from mor_jax.infer.stages import dispatch
from mor_jax.mesh.devices import GIB
from mor_jax.model.transformer import init_params
from mor_jax.plan import hlo
from mor_jax.plan.clock import Clock, clock_of
from mor_jax.plan.compile import does_not_fit, is_out_of_memory
from mor_jax.plan.topology import Topology

_USABLE = 0.9
"""Share of the memory that an estimate may fill."""
_TILE = (8, 128)
"""Heads and head dims of gathered keys are filled up to multiples of these inside a TPU's program."""
_STAGED = 1.25
"""Sequences that hold pages over those that run."""


@dataclass(frozen=True)
class Program:
    """What a compiled program takes beside the weights and the caches that it works on."""

    activations: int
    """Bytes of temporaries at their peak, and of outputs that reuse no argument."""
    arguments: int
    """Bytes of all arguments, padded to the chip's tiles."""
    code: int
    """Bytes of the program."""
    seconds: float
    """Wall-clock time of tracing, lowering and compiling."""
    clock: Clock | None
    """Cycles, where the compiler left its dump."""


@dataclass(frozen=True)
class CompiledDecode:
    """The engine's two programs for one described chip."""

    config: Config
    topology: Topology
    options: EngineOptions
    shape: EngineShape
    model: DecodeModel
    """Abstract."""
    state: EngineState
    """Abstract."""
    dispatch: Program
    """``shape.steps`` decoding steps."""
    prefill: Program
    """One chunk of ``options.prefill_rows`` prompts."""

    @property
    def memory(self) -> "DecodeMemory":
        """Bytes of the chip by kind."""
        parameters = tree_bytes(self.model)
        kv_pages = sum(tree_bytes((pool.keys, pool.values)) for pool in self.state.cache.pools)
        state = tree_bytes(self.state) - kv_pages + tree_bytes(empty_control(self.shape.places))
        return DecodeMemory(
            parameters=parameters,
            kv_pages=kv_pages,
            state=state,
            padding=max(0, self.dispatch.arguments - parameters - kv_pages - state),
            activations=max(self.dispatch.activations, self.prefill.activations),
            code=self.dispatch.code + self.prefill.code,
            limit=self.topology.generation.program_bytes,
        )


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes of one chip's memory while an engine runs, as the compiler allots them."""

    parameters: int
    """Weights in the compute dtype."""
    kv_pages: int
    """Pools of keys and values, whether in use or not."""
    state: int
    """Page tables, requests, states between passes."""
    padding: int
    """Of all these to the chip's tiles: a TPU fills up rows of heads and head dims."""
    activations: int
    """Temporaries of the program that needs more of them."""
    code: int
    """Both programs."""
    limit: float
    """What programs may use."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.kv_pages + self.state + self.padding + self.activations + self.code


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of (abstract) arrays, unpadded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_decode(
    config: Config, topology: Topology, options: EngineOptions, dump: Path | None = None
) -> CompiledDecode:
    """Compile the engine's programs for the first chip of a topology.

    Args:
        config: its model counts; mesh and training do not.
        topology: from ``describe_topology``.
        options: sizes of the engine.
        dump: see ``compile_step``.

    Raises:
        DoesNotFitError: they exceed the memory of a chip.
        UserError: the model cannot decode, or the mesh asks for a sharded engine.
    """
    refusal = decoding_refusal(config.model, _router_state(config.model))
    require(refusal is None, refusal or "")
    for axis in ("fsdp", "context", "tensor"):
        size = getattr(config.mesh, axis)
        require(size == 1, f"mesh.{axis}={size} has no meaning for --decode: the engine planned is that of one chip")
    device = SingleDeviceSharding(topology.devices[0])
    put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)  # noqa: E731
    model = put(jax.eval_shape(lambda key: _weights(config.model, key), jax.random.key(0)))
    options = with_prefill_sizes(options, "tpu", config.model.context_length)
    shape = engine_shape(model, options)
    state = put(jax.eval_shape(lambda model: init_state(model, shape), model))
    control = put(empty_control(shape.places))
    rows, chunk = options.prefill_rows, options.prefill_chunk
    assert rows is not None
    assert chunk is not None
    prompts = put((np.zeros(rows, np.int32), np.zeros((rows, chunk), np.int32), *np.zeros((3, rows), np.int32)))
    held = tokens_held(shape)
    try:
        programs = (
            _compile(lambda: dispatch.lower(model, state, control, shape=shape), topology, dump, held / TOKEN_BLOCK),
            _compile(lambda: prefill.lower(model, state.cache, *prompts), topology, dump, held / PROMPT_BLOCK),
        )
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(str(error)):
            raise
        raise does_not_fit(str(error), topology, "the engine") from error
    return CompiledDecode(config, topology, options, shape, model, state, *programs)


def _router_state(model: ModelConfig) -> jax.Array:
    """What training adds to the weights, float32 [R]: a loss-free bias or running boundaries."""
    return jnp.zeros(model.recursion.num_recursions)


def _weights(model: ModelConfig, key: jax.Array) -> DecodeModel:
    state_R = _router_state(model)
    return prepare_weights(model, init_params(model, key), router_bias_R=state_R, running_R=state_R)


def tokens_held(shape: EngineShape) -> int:
    """T that estimate and clock assume of every sequence: half of what it may hold."""
    return shape.max_length // 2


def _compile(lower: Any, topology: Topology, dump: Path | None, blocks: float) -> Program:
    """Compile a program whose attention reads so many blocks of entries, and whose rows are sampled greedily.

    The other loop of unknown length, over the pieces of a chunk of prompts, has the same number in the clock: mostly 1.
    """
    start = time.monotonic()
    with jax.set_mesh(Mesh(topology.devices[:1], ("data",))):  # what `target_platform` goes by
        compiled = lower().compile()
    seconds, analysis = time.monotonic() - start, compiled.memory_analysis()
    clock = None
    if dump is not None:
        module = dataclasses.replace(hlo.parse(compiled.as_text()), unknown_trips=math.ceil(blocks), switch=0)
        clock = clock_of(module, dump, topology.generation, 1)
    return Program(
        activations=analysis.temp_size_in_bytes + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        arguments=analysis.argument_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        seconds=seconds,
        clock=clock,
    )


def advise_decode(config: Config, topology: Topology, options: EngineOptions) -> str:
    """Say in words how many sequences would fit, by estimate."""
    model, layout, generation = config.model, kv_layout(config.model), topology.generation
    weights = tree_bytes(jax.eval_shape(lambda key: _weights(model, key), jax.random.key(0)))
    entry = entry_bytes(model, options.kv_dtype)
    longest = options.max_length or model.context_length
    length = -(-longest // options.page_size) * options.page_size
    per_sequence = length * entry * (layout.groups * layout.block_layers + layout.edge_layers)
    free = generation.program_bytes * _USABLE - weights
    # attention gathers a block of one layer's entries at a time, whose heads and head dims are filled up to whole tiles
    sides = zip((model.num_kv_heads, model.head_dim), _TILE, strict=True)
    filled = math.prod(-(-side // tile) * tile / side for side, tile in sides)
    running = int(free / (per_sequence * _STAGED + min(length, TOKEN_BLOCK) * entry * filled))
    if running < 1:
        return f"by estimate the weights ({weights / GIB:.1f} GiB) leave no room for a sequence of {length} tokens"
    return f"by estimate --engine.max-running {running} fits with {length} tokens each"

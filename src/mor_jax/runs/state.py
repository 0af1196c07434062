"""Everything that a training run changes, as one pytree."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mor_jax.array_types import Params
from mor_jax.config import Config, ModelConfig
from mor_jax.data.special_tokens import SpecialTokens
from mor_jax.mesh.mesh import check_mesh, state_shardings
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.runs.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """State after ``step`` optimiser steps."""

    step: jax.Array
    """int32 scalar: optimiser steps done; also the next batch's index."""
    params: Params
    """float32 master weights."""
    opt_state: Any
    """Of ``make_optimizer``."""
    router_bias_R: jax.Array
    """float32 [R]: token-choice's loss-free bias; zeros otherwise."""
    boundaries_R: jax.Array
    """float32 [R]: running boundaries of expert-choice (``routing.boundaries``); NaN where there is none (yet)."""
    key: jax.Array
    """Typed random key; every step folds its number in."""


@struct.dataclass
class ModelState:
    """What of a train state the model computes with; the fields are the train state's."""

    step: jax.Array
    """int32 scalar: optimiser steps behind the parameters."""
    params: Params
    """float32 weights."""
    router_bias_R: jax.Array
    """float32 [R]: token-choice's loss-free bias; zeros otherwise."""
    boundaries_R: jax.Array
    """float32 [R]: running boundaries of expert-choice; NaN where there is none."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights of another model that a run starts from."""

    params: Params
    """float32 tree of the run's model, on the host."""
    tokenizer_hash: str | None
    """Of the tokenizer that these weights belong to; None is unknown."""
    origin: str
    """What they are, for the log."""
    special: SpecialTokens | None = None
    """Special tokens of that tokenizer."""
    router_bias_R: Any = None
    """float32 [R], the bias of loss-free balancing that belongs to them; None leaves the run's own."""


def place_weights(state: TrainState, first: InitialWeights) -> TrainState:
    """Return the state with other weights: host arrays put on the shardings of those it has, shard by shard."""

    def place(old: jax.Array, new: Any) -> jax.Array:
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: np.asarray(new[index], old.dtype))

    params = jax.tree.map(place, state.params, dict(first.params))
    if first.router_bias_R is None:
        return dataclasses.replace(state, params=params)
    return dataclasses.replace(state, params=params, router_bias_R=place(state.router_bias_R, first.router_bias_R))


def _init(config: Config) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    params = init_params(config.model, init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optimizer, config.train.steps).init(params),
        router_bias_R=jnp.zeros((config.model.recursion.num_recursions,), jnp.float32),
        boundaries_R=jnp.full((config.model.recursion.num_recursions,), jnp.nan, jnp.float32),
        key=run_key,
    )


def abstract_train_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the train state as ``jax.ShapeDtypeStruct`` with shardings; nothing is allocated.

    Raises:
        UserError: the mesh does not divide the batch or the model.
    """
    check_mesh(config, mesh)
    shapes = jax.eval_shape(lambda: _init(config))
    shardings = state_shardings(mesh, shapes, logical_axes(config.model))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_model_state(model: ModelConfig, sharding: jax.sharding.Sharding) -> ModelState:
    """Return the model's part of a train state as ``jax.ShapeDtypeStruct``, every leaf on one sharding."""

    def init() -> ModelState:
        per_recursion = jnp.zeros((model.recursion.num_recursions,), jnp.float32)
        params = init_params(model, jax.random.key(0))
        return ModelState(jnp.zeros((), jnp.int32), params, router_bias_R=per_recursion, boundaries_R=per_recursion)

    shapes = jax.eval_shape(init)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def init_train_state(config: Config, mesh: Mesh) -> TrainState:
    """Initialise parameters and optimiser state, each leaf made as its own shards.

    Args:
        config: model, optimiser and ``train.seed``.
        mesh: from ``make_mesh``.

    Returns:
        The state before the first step.

    Raises:
        UserError: the mesh does not divide the batch or the model.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(config, mesh))
    return jax.jit(lambda: _init(config), out_shardings=shardings)()

"""Tiny models on meshes of fake devices: loss and gradients, and the compiled program that computes them."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import Config, MeshConfig, RecursionConfig, RoutingConfig
from mor_jax.mesh.mesh import make_mesh, params_shardings, shard_batch
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.plan.collectives import Collective, collectives
from mor_jax.plan.hlo import Module, parse
from mor_jax.train.objective import loss_fn
from mor_jax.train.step import compile_train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import tiny_runs  # pyright: ignore[reportMissingImports]

TOKENS = 40
"""Tokens per row: no size of a parameter, so that a shape tells what an array holds."""


def config_of(router: str, kv_strategy: Any = "recursion", execution: Any = "gather", recursions: int = 2) -> Config:
    """Two unrolled layers per recursion's worth of tokens; 16 rows of 40 tokens in chunks of 5."""
    config = tiny_runs.tiny_config(routing=RoutingConfig(kind=router), batch_size=16)  # pyright: ignore[reportArgumentType]
    recursion = RecursionConfig(num_recursions=recursions, sharing="cycle", kv_strategy=kv_strategy)
    model = dataclasses.replace(config.model, num_layers=recursions, context_length=TOKENS, recursion=recursion)
    perf = dataclasses.replace(config.perf, loss_chunk=5, execution=execution)
    return dataclasses.replace(config, model=model, perf=perf)


def compile_gradients(config: Config, mesh_config: MeshConfig) -> tuple[Any, Any, Any]:
    """(executable of loss and gradients, parameters, batch) on as many devices as the mesh has."""
    count = math.prod(size for size in vars(mesh_config).values())
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    shardings = params_shardings(mesh, logical_axes(config.model))
    params = jax.device_put(jax.jit(lambda key: init_params(config.model, key))(jax.random.key(0)), shardings)
    batch = shard_batch(mesh, tiny_runs.make_batch(config))

    def loss(params: Any, batch: Any) -> Any:
        return loss_fn(config, params, jnp.zeros(config.model.recursion.num_recursions), batch, jax.random.key(1), None)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, shardings))
    with jax.set_mesh(mesh):
        return step.lower(params, batch).compile(), params, batch


def loss_and_gradients(config: Config, mesh_config: MeshConfig) -> tuple[Any, Any]:
    """((loss, its parts), gradients) as numpy arrays."""
    executable, params, batch = compile_gradients(config, mesh_config)
    return jax.device_get(executable(params, batch))


def traffic(config: Config, mesh_config: MeshConfig) -> tuple[list[Collective], Module]:
    """Collectives of the program, and the program."""
    executable, _, _ = compile_gradients(config, mesh_config)
    module = parse(executable.as_text())
    return collectives(module, math.prod(vars(mesh_config).values())), module


def step_traffic(config: Config, mesh_config: MeshConfig) -> list[Collective]:
    """Collectives of the whole training step."""
    count = math.prod(vars(mesh_config).values())
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    executable: Any = compile_train_step(dataclasses.replace(config, mesh=mesh_config), mesh)
    return collectives(parse(executable.as_text()), count)


def assert_equal(one: Any, many: Any, tolerance: float = 1e-5) -> None:
    """Compare trees leaf by leaf."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, many)

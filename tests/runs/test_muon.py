"""Muon against a plain loop over single matrices and against optax, on one device and on meshes."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, RecursionConfig, RelaxationConfig, RoutingConfig
from mor_jax.mesh.mesh import make_mesh, params_shardings
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.plan.collectives import collectives
from mor_jax.plan.hlo import parse
from mor_jax.runs.muon import MATRICES, matrix_axes
from mor_jax.runs.optimizer import decay_mask, make_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

RATE, DECAY = 0.5, 0.1
MODEL = ModelConfig(
    vocab_size=32,
    num_layers=8,  # unique first and last, three in the block
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=20,
    context_length=16,
    dtype="float32",
    recursion=RecursionConfig(
        num_recursions=2, sharing="middle_cycle", share_norms=False, relaxation=RelaxationConfig(lora_rank=2)
    ),
    routing=RoutingConfig(kind="expert", router="mlp", sampling="aux_router"),
)
OPTIMIZER = OptimizerConfig(
    kind="muon", learning_rate=RATE, warmup_steps=0, decay_share=0.0, weight_decay=DECAY, clip_norm=1.0
)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five iterations on one matrix, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def update_of_matrix(matrix: np.ndarray) -> np.ndarray:
    """What Muon adds for one momentum [in, out] at a rate of 1, without decay."""
    return -0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix)


def loop(name: tuple[str, str], momentum: np.ndarray) -> np.ndarray:
    """The update of one layer's weight, matrix by matrix, by hand."""
    if name == ("attention", "query"):
        width = momentum.shape[0]
        return update_of_matrix(momentum.reshape(width, -1)).reshape(momentum.shape)
    if name == ("attention", "output"):
        width = momentum.shape[-1]
        return update_of_matrix(momentum.reshape(-1, width)).reshape(momentum.shape)
    if name == ("ffn", "down"):
        return update_of_matrix(momentum)
    parts = [momentum[:, i].reshape(momentum.shape[0], -1) for i in range(2)]  # key and value, or gate and up
    return np.stack([update_of_matrix(part).reshape(momentum[:, 0].shape) for part in parts], axis=1)


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def gradients(params) -> list[Any]:
    """Of two steps, of which the first is clipped."""
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    draw = lambda scale: structure.unflatten([np.float32(scale * random.normal(size=x.shape)) for x in leaves])  # noqa: E731
    return [draw(0.1), draw(0.001)]


def clipped(gradient: Any) -> Any:
    """A gradient whose norm is at most 1, in float64; the auxiliary router's is clipped by itself."""
    model = {name: value for name, value in gradient.items() if name != "aux_router"}
    norm = math.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(model)))
    return jax.tree.map(lambda x: np.float64(x) / max(1.0, norm), model)


def run(params: Any, gradients: list[Any], config: OptimizerConfig = OPTIMIZER) -> list[Any]:
    """Updates of some steps; the parameters stay where they are."""
    optimizer = make_optimizer(config, 10)
    state, found = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        found.append(updates)
    return found


@pytest.fixture(scope="module")
def one_device(params, gradients) -> list[Any]:
    return jax.device_get(jax.jit(run)(params, gradients))


def test_every_matrix_is_orthogonalised_by_itself(params, gradients, one_device):
    """Per layer, key and value apart, gate and up apart, all heads together; momentum by hand over two steps."""
    first, second = map(clipped, gradients)
    checked = set()
    for path, weight in jax.tree.leaves_with_path(params):
        name = tuple(key.key for key in path[-2:])
        if name not in MATRICES:
            continue
        of = lambda tree, path=path: tree[path[0].key][path[1].key][path[2].key]  # noqa: E731
        momenta = [1.95 * of(first), of(second) + 0.95 * (of(second) + 0.95 * of(first))]  # Nesterov
        for momentum, updates in zip(momenta, one_device, strict=True):
            layers = momentum if path[0].key == "block" else momentum[None]
            wanted = np.stack([loop(name, layer) for layer in layers]).reshape(weight.shape)
            np.testing.assert_allclose(of(updates), RATE * (wanted - DECAY * np.asarray(weight)), atol=2e-4)
        checked.add((path[0].key, *name))
    assert checked == {(part, *name) for part in ("block", "first", "last") for name in MATRICES}


def test_the_first_step_is_that_of_optax(params, gradients, one_device):
    """Later ones differ: optax corrects the momentum's bias, which Jordan et al. do not."""
    axes = {"query": ((-3,), (-2, -1)), "key_value": ((-4,), (-2, -1)), "gate_up": ((-3,), (-1,))}
    axes |= {"output": ((-3, -2), (-1,)), "down": ((-2,), (-1,))}

    def numbers(tree: Any) -> Any:
        def of_leaf(path: Any, leaf: jax.Array) -> Any:
            if path[-2].key not in ("attention", "ffn"):
                return None
            inputs, outputs = (tuple(leaf.ndim + i for i in part) for part in axes[path[-1].key])
            return optax.contrib.MuonDimensionNumbers(inputs, outputs)

        return jax.tree.map_with_path(of_leaf, tree)

    theirs = optax.contrib.muon(
        RATE, weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=numbers, adam_b2=0.95
    )
    model = {name: value for name, value in params.items() if name != "aux_router"}
    gradient = {name: gradients[0][name] for name in model}
    wanted, _ = jax.jit(theirs.update)(gradient, theirs.init(model), model)
    for path, update in jax.tree.leaves_with_path(wanted):
        if matrix_axes(path) is not None:
            ours = one_device[0][path[0].key][path[1].key][path[2].key]
            np.testing.assert_allclose(ours, update, atol=2e-5)


def test_everything_else_is_adamw(params, gradients, one_device):
    """Embedding, norms, both routers, whose MLP has an `output` too; clipped with the matrices."""
    adamw = jax.jit(lambda *a: run(*a, config=dataclasses.replace(OPTIMIZER, kind="adamw")))(params, gradients)
    others = set()
    for path, update in jax.tree.leaves_with_path(one_device[1]):
        theirs = adamw[1]
        for key in path:
            theirs = theirs[key.key]
        if matrix_axes(path) is None:
            np.testing.assert_allclose(update, theirs, rtol=1e-6)
            others.add(path[0].key)
        else:
            assert np.abs(update - theirs).max() > 0.01
    assert others == set(params) - {"block"}


def test_the_table_names_the_axes_of_the_model(params):
    """The logical axes that the model's own weights are declared with."""
    for path, axes in jax.tree.leaves_with_path(logical_axes(MODEL), is_leaf=lambda x: isinstance(x, tuple)):
        named = matrix_axes(path)
        if named is not None:
            assert axes == (("layers", *named) if path[0].key == "block" else named)

"""Muon against a plain loop over single matrices and against optax, on one device and on meshes."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mor_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RecursionConfig,
    RelaxationConfig,
    RoutingConfig,
)
from mor_jax.mesh.mesh import make_mesh, params_shardings
from mor_jax.model.optimizer_costs import moment_values, optimizer_costs
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.plan.collectives import collectives
from mor_jax.plan.hlo import parse
from mor_jax.plan.hlo_flops import matrix_flops
from mor_jax.runs.muon import MATRICES, matrix_axes
from mor_jax.runs.optimizer import make_optimizer

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
    return jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))


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
    state, found, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(jax.device_get(updates))
    return found


@pytest.fixture(scope="module")
def one_device(params, gradients) -> list[Any]:
    return run(params, gradients)


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
            np.testing.assert_allclose(of(updates), RATE * (wanted - DECAY * np.asarray(weight)), atol=2e-5)
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
    adamw = run(params, gradients, dataclasses.replace(OPTIMIZER, kind="adamw"))
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


def compile_on(mesh_config: MeshConfig, params: Any, gradient: Any) -> tuple[Any, Any]:
    """(updates of one step as numpy arrays, the compiled program) with everything sharded as training shards it."""
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(vars(mesh_config).values())])
    shardings = params_shardings(mesh, logical_axes(MODEL))
    params, gradient = jax.device_put((params, gradient), (shardings, shardings))
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(OPTIMIZER, 10)
        step = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0], out_shardings=shardings)
        step = step.lower(params, gradient).compile()
    return jax.device_get(step(params, gradient)), step


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=4, tensor=2),
        MeshConfig(data=4, fsdp=2),  # replicas share a place's matrices; one of them has none of 10 squares' 5
        MeshConfig(slice=2, data=1, context=2, tensor=2),
    ],
    ids=lambda mesh: ",".join(f"{name}={size}" for name, size in vars(mesh).items() if size > 1),
)
def test_a_mesh_equals_one_device(mesh, params, gradients, one_device):
    """Empty places change no matrix, and products are counted and moved as ``optimizer_costs`` says, in whole ones."""
    updates, step = compile_on(mesh, params, gradients[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one_device[0], updates)
    module = parse(step.as_text())
    costs = optimizer_costs(Config(model=MODEL, optimizer=OPTIMIZER), vars(mesh))
    assert matrix_flops(module).total == costs.flops
    # all that is exchanged beside them are the scalars of the gradient's norm
    found = [
        item
        for item in collectives(module, math.prod(vars(mesh).values()), mesh.slice)
        if any(shape.sizes for shape in item.operands)
    ]
    assert not any(item.across for item in found)
    replicas = mesh.data * mesh.context > 1
    assert {item.kind for item in found} == {"all-to-all"} | ({"all-reduce"} if replicas else set())
    assert sum(item.total_bytes for item in found) == costs.received


def test_costs_on_one_device(params):
    """Moments are those that the optimiser holds; FLOPs by hand."""
    config = Config(model=MODEL, optimizer=OPTIMIZER)
    state = jax.eval_shape(make_optimizer(OPTIMIZER, 10).init, params)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == moment_values(config)
    assert moment_values(dataclasses.replace(config, optimizer=OptimizerConfig())) == 2 * sum(
        x.size for x in jax.tree.leaves(params)
    )
    square = 10 * 5 * (4 * 16**2 * 24 + 2 * 16**3)  # query, output: 16 x 24, five layers
    keys = 10 * 5 * (4 * 12**2 * 16 + 2 * 12**3)  # key, value: 16 x 12
    feed_forward = 15 * 5 * (4 * 16**2 * 20 + 2 * 16**3)  # gate, up, down: 16 x 20
    assert optimizer_costs(config).flops == square + keys + feed_forward
    assert optimizer_costs(dataclasses.replace(config, optimizer=OptimizerConfig())).flops == 0

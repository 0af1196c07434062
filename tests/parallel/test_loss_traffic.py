"""The fused loss on a mesh, read from its compiled program: the head moves once per step, logits never."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mor_jax.config import MeshConfig
from mor_jax.mesh.axes import partition_spec
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.loss import fused_cross_entropy, token_nll
from mor_jax.plan.collectives import Collective, collectives
from mor_jax.plan.hlo import parse

B, T, D, V, CHUNK = 16, 40, 32, 64, 5
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def loss(hidden_BTD, head_VD, targets_BT, weights_BT):
    return fused_cross_entropy(hidden_BTD, head_VD, targets_BT, weights_BT, chunk=CHUNK, z_coefficient=0.01).loss_sum


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_BTD, head_VD = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D))
    return hidden_BTD, head_VD, jax.random.randint(keys[2], (B, T), 0, V), jax.random.uniform(keys[3], (B, T))


def compile_on(mesh, function, ambient=True):
    axes = [("batch", "sequence", None), ("vocab", "embed"), ("batch", "sequence"), ("batch", "sequence")]
    shardings = [NamedSharding(mesh, partition_spec(names)) for names in axes]
    arguments = [jax.device_put(x, s) for x, s in zip(inputs(), shardings, strict=True)]
    step = jax.jit(function, out_shardings=(shardings[0], shardings[1]))
    if not ambient:
        return step.lower(*arguments).compile(), arguments
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile(), arguments


def of_head(found: list[Collective]) -> list[tuple[str, int, tuple[int, ...]]]:
    """(kind, executions, shape) of what has a whole or half head's size."""
    sizes = [(i.kind, i.executions, s.sizes) for i in found for s in i.operands]
    heads = [(v, d) for v in (V, V // 2) for d in (D, D // 2)]
    return sorted(item for item in sizes if item[2] in heads)


def test_the_head_is_gathered_once_and_its_gradient_summed_once():
    executable, _ = compile_on(make_mesh(CUBE), jax.grad(loss, argnums=(0, 1)))
    found = collectives(parse(executable.as_text() or ""), 8)
    assert of_head(found) == [
        ("all-gather", 1, (V // 2, D // 2)),
        ("all-reduce", 1, (V // 2, D // 2)),
        ("reduce-scatter", 1, (V // 2, D)),
    ]
    in_loop = [item for item in found if item.executions > 1]
    assert {item.executions for item in in_loop} == {T // CHUNK}
    assert all(shape.elements == B // 4 * CHUNK for item in in_loop for shape in item.operands)  # never the vocabulary


def test_left_to_the_partitioner_the_gradient_is_summed_in_every_chunk():
    """Why the loss names its own collectives; without an ambient mesh the compiler chooses them."""
    executable, _ = compile_on(make_mesh(CUBE), jax.grad(loss, argnums=(0, 1)), ambient=False)
    repeated = [item for item in of_head(collectives(parse(executable.as_text() or ""), 8)) if item[1] > 1]
    assert repeated


@pytest.mark.parametrize("mesh", [CUBE, MeshConfig(slice=2, data=1, context=4)], ids=["cube", "slice x context"])
def test_value_and_gradients_equal_one_device(mesh):
    def step(*arguments):
        return jax.grad(loss, argnums=(0, 1))(*arguments)

    executable, arguments = compile_on(make_mesh(mesh), step)
    for mine, wanted in zip(executable(*arguments), step(*inputs()), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


def test_token_nll_equals_one_device():
    def step(hidden_BTD, head_VD, targets_BT, _):
        return token_nll(hidden_BTD, head_VD, targets_BT, chunk=CHUNK)

    mesh = make_mesh(CUBE)
    arguments = [jnp.asarray(x) for x in inputs()]
    with jax.set_mesh(mesh):
        mine = jax.jit(step)(*arguments)
    np.testing.assert_allclose(mine, step(*arguments), rtol=1e-5, atol=1e-5)

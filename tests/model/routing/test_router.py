"""Router scores, gates and the depths that they choose against tables worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.model.routing import router as routing
from mor_jax.model.routing.decide import best_depth

LN2 = math.log(2)
TOKEN = RoutingConfig("token", score="softmax", alpha=1.0)


def _model(recursions: int = 2, base: RoutingConfig | None = None, **changes) -> ModelConfig:
    chosen = dataclasses.replace(base or RoutingConfig("expert"), **changes)
    return ModelConfig(recursion=RecursionConfig(recursions, "cycle"), routing=chosen)


def _bits(*rows: str) -> jax.Array:
    return jnp.array([[mark == "x" for mark in row] for row in rows])


def test_a_linear_router_is_a_product_and_temperature_divides_its_input():
    x_BTD = jnp.array([[[1.0, 2.0], [3.0, -1.0]]])
    params = {"kernel": jnp.array([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])}
    np.testing.assert_allclose(routing.raw_scores(params, x_BTD), [[[4, 2, 1], [5, -1, 3]]])
    np.testing.assert_allclose(routing.raw_scores(params, x_BTD, 2.0), [[[2, 1, 0.5], [2.5, -0.5, 1.5]]])


def test_an_mlp_router_has_one_exact_gelu_layer():
    params = {"hidden": jnp.array([[1.0, -1.0]]), "output": jnp.array([[1.0], [10.0]])}
    raw = routing.raw_scores(params, jnp.array([[[2.0]]]))
    normal_cdf = 0.5 * (1 + math.erf(2 / math.sqrt(2)))
    np.testing.assert_allclose(raw[0, 0, 0], 2 * normal_cdf - 20 * (1 - normal_cdf), rtol=1e-5)


@pytest.mark.parametrize("shapes", [{"kernel": (3, 4, 1)}, {"hidden": (3, 4, 8), "output": (3, 8, 1)}])
def test_every_token_can_be_scored_by_the_router_of_its_own_recursion(shapes):
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x_BTD, recursion_BT = jnp.asarray(generator.normal(size=(1, 4, 4)), jnp.float32), jnp.array([[2, 0, 1, 7]])
    found_BT = routing.raw_scores_at(params, x_BTD, recursion_BT, 2.0)
    for t, r in enumerate((2, 0, 1, 2)):  # beyond the last is the last
        own = routing.raw_scores({name: leaf[r] for name, leaf in params.items()}, x_BTD, 2.0)
        np.testing.assert_allclose(found_BT[0, t], own[0, t, 0], rtol=1e-5)


def test_bfloat16_states_are_scored_in_float32():
    x_BTD = jnp.array([[[1.0, 1.0]]], jnp.bfloat16)
    raw = routing.raw_scores({"kernel": jnp.array([[1.0], [2.0**-12]])}, x_BTD)
    assert raw.dtype == jnp.float32 and float(raw[0, 0, 0]) == 1 + 2.0**-12


@pytest.mark.parametrize(
    ("kind", "router", "shapes"),
    [
        ("expert", "linear", {"kernel": (3, 960, 1)}),
        ("expert", "mlp", {"hidden": (3, 960, 1920), "output": (3, 1920, 1)}),
        ("expert", "wide_mlp", {"hidden": (3, 960, 3840), "output": (3, 3840, 1)}),
        ("token", "linear", {"kernel": (960, 3)}),
        ("token", "mlp", {"hidden": (960, 1920), "output": (1920, 3)}),
    ],
)
def test_expert_choice_has_a_router_per_recursion_and_token_choice_one(kind, router, shapes):
    model = _model(3, TOKEN if kind == "token" else None, router=router)
    params = jax.eval_shape(lambda key: routing.Router(model).init(key), jax.random.key(0))["params"]
    assert {name: box.value.shape for name, box in params.items()} == shapes


def test_hidden_width_can_be_set_as_released():
    model = _model(3, router="wide_mlp", router_expansion=2)
    params = jax.eval_shape(lambda key: routing.Router(model).init(key), jax.random.key(0))["params"]
    assert params["hidden"].value.shape == (3, 960, 1920)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("sigmoid", [0.5 * 0.25, 0.5 * 0.5]),
        ("tanh", [0.5 * math.tanh(-math.log(3)), 0.0]),
        ("none", [-0.5 * math.log(3), 0.0]),
    ],
)
def test_scores_of_expert_choice(score, expected):
    raw = jnp.array([-math.log(3), 0.0])
    np.testing.assert_allclose(routing.score(_model(score=score, alpha=0.5), raw), expected, rtol=1e-5)


def test_scores_of_token_choice_compare_the_depths():
    model = dataclasses.replace(_model(), routing=dataclasses.replace(TOKEN, alpha=0.5))
    raw_BTR = jnp.array([[[math.log(3), 0.0]]])
    np.testing.assert_allclose(routing.score(model, raw_BTR), [[[0.375, 0.125]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("gating", "residual", "expected"),
    [
        ("weighted", "paper", [[1.5, 3.0]]),  # g * block(x)
        ("weighted", "plain", [[1.0, 2.0]]),  # g * (block(x) - x)
        ("additive", "paper", [[3.0, 6.0]]),  # the gate is left out
        ("additive", "plain", [[2.0, 4.0]]),
    ],
)
def test_gate_and_residual_forms(gating, residual, expected):
    out_BCD, x_BCD = jnp.array([[[3.0, 6.0]]]), jnp.array([[[1.0, 2.0]]])
    gate_BC = jnp.array([[0.5]])
    np.testing.assert_allclose(
        routing.gated(_model(gating=gating, residual=residual), gate_BC, out_BCD, x_BCD)[0], expected
    )


def test_the_best_depth_is_the_best_scored_of_those_allowed():
    gates_BTR = jnp.array([[[0.2, 0.1, 0.7], [0.1, 0.3, 0.6], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]])
    assert best_depth(gates_BTR, None).tolist() == [[3, 3, 1, 3]]
    assert best_depth(gates_BTR, None, jnp.int32(2)).tolist() == [[1, 2, 1, 2]]
    assert best_depth(gates_BTR, None, jnp.array([[1, 2, 3, 3]])).tolist() == [[1, 2, 1, 3]]
    assert best_depth(gates_BTR, jnp.array([0.0, 0.5, 0.5]), jnp.int32(2)).tolist() == [[2, 2, 2, 2]]

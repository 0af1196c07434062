"""Schedules against literal values, the decay mask, and the auxiliary router's own optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.config import OptimizerConfig
from mor_jax.runs.optimizer import decay_mask, make_optimizer, make_schedule

PARAMS = {
    "block": {"attention_norm": {"scale": jnp.ones((2, 3))}, "ffn": {"down": jnp.ones((2, 3, 4))}},
    "final_norm": {"scale": jnp.ones((3,))},
    "aux_router": {"kernel": jnp.ones((2, 3, 1))},
}


def _rates(config: OptimizerConfig, steps: int) -> list[float]:
    schedule = make_schedule(config, steps)
    return [round(float(schedule(step)), 6) for step in range(steps)]


def test_wsd_warms_up_stays_and_falls_to_zero():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, decay_share=0.4)
    assert _rates(config, 10) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert float(make_schedule(config, 10)(10)) == 0


def test_cosine_falls_to_its_minimum():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=2, min_ratio=0.1)
    rates = _rates(config, 10)
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert float(make_schedule(config, 10)(10)) == pytest.approx(0.2)


def test_no_warm_up_and_no_decay_is_constant():
    assert _rates(OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_share=0.0), 3) == [1, 1, 1]


def test_decay_reaches_matrices_only():
    assert decay_mask(PARAMS) == {
        "block": {"attention_norm": {"scale": False}, "ffn": {"down": True}},
        "final_norm": {"scale": False},
        "aux_router": {"kernel": True},
    }


def _step(config: OptimizerConfig, gradients: dict, steps: int = 10) -> dict:
    optimizer = make_optimizer(config, steps)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    return updates  # pyright: ignore[reportReturnType]


def test_zero_gradients_leave_only_the_decay_of_matrices():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, aux_router_ratio=10.0)
    updates = _step(config, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["block"]["ffn"]["down"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["aux_router"]["kernel"], -0.5, rtol=1e-6)
    for scale in (updates["block"]["attention_norm"]["scale"], updates["final_norm"]["scale"]):
        np.testing.assert_array_equal(scale, 0)


def test_the_auxiliary_router_learns_faster_and_is_clipped_alone():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0, epsilon=1.0, aux_router_ratio=10.0)
    gradients = jax.tree.map(jnp.zeros_like, PARAMS)
    gradients["final_norm"]["scale"] = jnp.array([100.0, 0, 0])
    gradients["aux_router"]["kernel"] = gradients["aux_router"]["kernel"].at[0, 0, 0].set(0.5)
    updates = _step(config, gradients)
    # Adam's first step is -rate * g / (|g| + epsilon)
    np.testing.assert_allclose(updates["final_norm"]["scale"][0], -0.1 * 1.0 / 2.0, rtol=1e-5)  # clipped from 100 to 1
    np.testing.assert_allclose(updates["aux_router"]["kernel"][0, 0, 0], -1.0 * 0.5 / 1.5, rtol=1e-5)  # not clipped


def test_adamw_equals_optax_without_an_auxiliary_router():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_share=0.0, clip_norm=0.0)
    params = {"final_norm": {"scale": jnp.arange(3.0)}}
    gradients = {"final_norm": {"scale": jnp.array([1.0, -2.0, 3.0])}}
    ours, theirs = make_optimizer(config, 10), optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    actual, _ = ours.update(gradients, ours.init(params), params)
    expected, _ = theirs.update(gradients, theirs.init(params), params)
    np.testing.assert_allclose(actual["final_norm"]["scale"], expected["final_norm"]["scale"], rtol=1e-6)  # pyright: ignore

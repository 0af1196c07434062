"""Router losses and statistics against tables worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.model.routing.losses import expert_losses, statistics, token_losses

LN2 = math.log(2)
TOKEN = RoutingConfig("token", score="softmax", alpha=1.0)


def _model(recursions: int = 2, base: RoutingConfig | None = None, **changes) -> ModelConfig:
    chosen = dataclasses.replace(base or RoutingConfig("expert"), **changes)
    return ModelConfig(recursion=RecursionConfig(recursions, "cycle"), routing=chosen)


def _bits(*rows: str) -> jax.Array:
    return jnp.array([[mark == "x" for mark in row] for row in rows])


RAW_RBT = jnp.array([[[0.0, 0.0, 0.0, 0.0]], [[math.log(3), 0.0, -math.log(3), 9.0]]])
ACTIVE_RBT = jnp.stack([_bits("xxxx"), _bits("xxx.")])
SELECTED_RBT = jnp.stack([_bits("xxx."), _bits("x.x.")])


def test_the_sampling_loss_is_a_mean_over_active_tokens_summed_over_recursions():
    """First recursion: 4 coins, ln 2. Second: sure and right (.75), undecided (.5), sure and wrong (.25)."""
    losses = expert_losses(_model(), RAW_RBT, None, ACTIVE_RBT, SELECTED_RBT)
    second = -(math.log(0.75) + math.log(0.5) + math.log(0.25)) / 3
    np.testing.assert_allclose(losses.sampling, LN2 + second, rtol=1e-6)
    np.testing.assert_allclose(losses.router_z, 2 * math.log(3) ** 2 / 3, rtol=1e-6)  # mean of squared scores
    assert float(losses.aux_router) == 0.0 and float(losses.balancing) == 0.0


def test_an_auxiliary_router_takes_the_sampling_loss_over():
    losses = expert_losses(_model(sampling="aux_router"), 7 * RAW_RBT, RAW_RBT, ACTIVE_RBT, SELECTED_RBT)
    expected = expert_losses(_model(), RAW_RBT, None, ACTIVE_RBT, SELECTED_RBT).sampling
    np.testing.assert_allclose(losses.aux_router, expected, rtol=1e-6)
    assert float(losses.sampling) == 0.0


def test_a_recursion_without_active_tokens_costs_nothing():
    losses = expert_losses(_model(), RAW_RBT, None, jnp.zeros_like(ACTIVE_RBT), SELECTED_RBT)
    assert float(losses.sampling) == 0.0 and float(losses.router_z) == 0.0


def test_balancing_and_z_loss_of_token_choice():
    """Mean scores (5/8, 3/8) against loads (3/4, 1/4): 2 x (5/8 x 3/4 + 3/8 x 1/4) = 9/8."""
    model = _model(2, TOKEN)
    raw_BTR = jnp.array([[[math.log(3), 0.0], [0.0, 0.0]]])
    counted_BT = _bits("xx")
    losses = token_losses(model, raw_BTR, jnp.array([0.75, 0.25]), counted_BT)
    np.testing.assert_allclose(losses.balancing, 9 / 8, rtol=1e-6)
    np.testing.assert_allclose(losses.router_z, (math.log(4) ** 2 + LN2**2) / 2, rtol=1e-6)
    padded = token_losses(model, raw_BTR, jnp.array([1.0, 0.0]), _bits("x."))
    np.testing.assert_allclose(padded.balancing, 1.5, rtol=1e-6)  # the second token is padding
    free = token_losses(_model(2, TOKEN, balancing="loss_free"), raw_BTR, jnp.array([0.75, 0.25]), counted_BT)
    assert float(free.balancing) == 0.0


def test_the_balancing_gradient_goes_through_the_scores_only():
    model = _model(2, TOKEN)

    def balancing(raw_BTR, load_R):
        return token_losses(model, raw_BTR, load_R, _bits("xx")).balancing

    raw_BTR = jnp.array([[[1.0, 0.0], [0.0, 0.5]]])
    by_raw, by_load = jax.grad(balancing, argnums=(0, 1))(raw_BTR, jnp.array([0.75, 0.25]))
    assert float(jnp.abs(by_raw).min()) > 0 and float(jnp.abs(by_load).max()) == 0


def _statistics(**changes):
    """Two rows of four tokens; the last token of row 1 is padding. Three recursions."""
    depth_BT = jnp.array([[3, 1, 1, 2], [1, 3, 1, 1]])
    selected_RBT = depth_BT[None] > jnp.arange(3)[:, None, None]
    active_RBT = jnp.concatenate([jnp.ones((1, 2, 4), bool), selected_RBT[:-1]])
    values = {
        "depth_BT": depth_BT,
        "chosen_BT": depth_BT,
        "decision_RBT": selected_RBT,
        "active_RBT": active_RBT.at[:, 1, 3].set(False),
        "selected_RBT": selected_RBT,
        "counted_BT": _bits("xxxx", "xxx."),
    }
    return statistics(_model(3), **{**values, **changes})


def test_tokens_per_depth_loads_and_dead_positions():
    found = _statistics()
    np.testing.assert_allclose(found.tokens_per_depth, [0, 4 / 7, 1 / 7, 2 / 7], rtol=1e-6)
    np.testing.assert_allclose(found.load_R, [4 / 7, 1 / 7, 2 / 7], rtol=1e-6)
    np.testing.assert_allclose(found.dead_token_ratio, 0.5)  # positions 2 and 3 reach the last recursion in no row
    np.testing.assert_allclose(found.max_vio, (4 / 7) / (1 / 3) - 1, rtol=1e-6)
    entropy = -sum(share * math.log(share) for share in (4 / 7, 1 / 7, 2 / 7))
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-6)
    assert float(found.dropped) == 0.0


def test_equal_loads_have_no_violation_and_full_entropy():
    balanced = _statistics(chosen_BT=jnp.array([[1, 2, 3, 1], [2, 3, 1, 1]]), counted_BT=_bits("xxx.", "xxx."))
    np.testing.assert_allclose(balanced.max_vio, 0.0, atol=1e-6)
    np.testing.assert_allclose(balanced.entropy, math.log(3), rtol=1e-6)


def test_one_depth_for_all_is_the_largest_violation():
    found = _statistics(chosen_BT=jnp.full((2, 4), 2))
    np.testing.assert_allclose(found.max_vio, 2.0, rtol=1e-6)
    np.testing.assert_allclose(found.entropy, 0.0, atol=1e-7)


def test_threshold_accuracy_compares_the_boundary_with_the_selection_among_active_tokens():
    """Recursion 1 agrees on 4 of 7; recursion 2 decides wrongly for one of its 7; recursion 3 for 1 of 3."""
    decision_RBT = jnp.stack([_bits("x...", "xxx."), _bits("xx.x", ".x.."), _bits("x..x", ".x..")])
    found = _statistics(decision_RBT=decision_RBT)
    np.testing.assert_allclose(found.threshold_accuracy_R, [4 / 7, 6 / 7, 2 / 3], rtol=1e-6)


def test_dropped_tokens_are_those_that_left_before_their_chosen_depth():
    chosen_BT = jnp.array([[3, 2, 1, 3], [1, 3, 1, 3]])  # of the counted: row 0 tokens 1 and 3
    np.testing.assert_allclose(_statistics(chosen_BT=chosen_BT).dropped, 2 / 7, rtol=1e-6)

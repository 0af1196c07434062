"""Tokens per recursion: the released rounding, multiples, seats and warm-ups, worked out by hand."""

import dataclasses

import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.model.routing.capacity import routed_tokens, token_seats, warmup_steps, warmup_table

EXPERT = RoutingConfig("expert")
TOKEN = RoutingConfig("token", score="softmax")


def _model(recursions: int, routing: RoutingConfig, **changes) -> ModelConfig:
    return ModelConfig(recursion=RecursionConfig(recursions, "cycle"), routing=dataclasses.replace(routing, **changes))


@pytest.mark.parametrize(
    ("recursions", "length", "changes", "expected"),
    [
        (2, 2048, {}, (2048, 1024)),
        (3, 2048, {}, (2048, 1365, 682)),
        (4, 2048, {}, (2048, 1536, 1024, 512)),
        (3, 2, {}, (2, 1, 1)),  # at least one
        (3, 2048, {"capacity_multiple": 128}, (2048, 1408, 768)),
        (3, 100, {"capacity_multiple": 64}, (100, 100, 64)),  # never beyond the row
        (3, 10, {"capacities": (0.8, 0.5, 0.05)}, (8, 5, 1)),
        (2, 10, {"capacities": (1.0, 0.29)}, (10, 2)),
    ],
)
def test_selected_tokens(recursions, length, changes, expected):
    assert routed_tokens(_model(recursions, EXPERT, **changes), length) == expected


@pytest.mark.parametrize(
    ("recursions", "length", "changes", "expected"),
    [
        (3, 12, {}, (12, 10, 5)),  # 1.25 x 8, 1.25 x 4
        (3, 12, {"capacity_slack": 1.0}, (12, 8, 4)),
        (3, 12, {"capacity_slack": 9.0}, (12, 12, 12)),
        (3, 12, {"capacities": (1.0, 0.5, 0.25)}, (12, 6, 3)),  # custom ones are taken as they are
        (2, 30, {"capacity_multiple": 8}, (30, 24)),  # 1.25 x 15 = 18.75
    ],
)
def test_seats_of_token_choice(recursions, length, changes, expected):
    assert token_seats(_model(recursions, TOKEN, **changes), length) == expected


def test_capacity_warms_up_along_a_cosine_from_everything_to_the_target():
    """Step s of 4 lies at (s + 1) / 4 of the cosine: remaining (1 + cos) / 2 = .854, .5, .146, 0."""
    model = _model(3, EXPERT, capacity_warmup_steps=4)
    second = [1000 * (2 / 3 + remaining / 3) for remaining in (0.853553, 0.5, 0.146447, 0.0)]
    third = [1000 * (1 / 3 + remaining * 2 / 3) for remaining in (0.853553, 0.5, 0.146447, 0.0)]
    assert [int(k) for k in second] == [951, 833, 715, 666] and [int(k) for k in third] == [902, 666, 430, 333]
    expected = [(1000, 951, 902), (1000, 833, 666), (1000, 715, 430), (1000, 666, 333)]
    assert [routed_tokens(model, 1000, step) for step in range(4)] == expected
    assert routed_tokens(model, 1000, 99) == routed_tokens(model, 1000) == expected[-1]
    np.testing.assert_array_equal(warmup_table(model, 1000), [*expected, expected[-1]])


def test_which_warm_up_changes_the_routing():
    both = {"capacity_warmup_steps": 5, "balance_warmup_steps": 7}
    assert warmup_steps(_model(2, EXPERT, **both)) == 5
    assert warmup_steps(_model(2, TOKEN, **both)) == 7
    assert warmup_steps(_model(2, RoutingConfig(), **both)) == 0


def test_without_warm_up_the_step_does_not_matter():
    model = _model(3, EXPERT)
    assert routed_tokens(model, 64, 0) == routed_tokens(model, 64)
    np.testing.assert_array_equal(warmup_table(model, 64), [[64, 42, 21]])

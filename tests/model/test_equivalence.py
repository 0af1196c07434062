"""`gather` == `scan` == a plain Python loop over unshared copies of the layers: values and gradients, to 1e-5.

The default run keeps a telling subset of the combinations; ``pytest -m slow tests/model`` runs the others.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_routing
import pytest
from equivalence_examples import (
    EXPERT,
    LENGTH,
    TOKEN,
    assert_close,
    assert_computes_the_same,
    by_model,
    by_plain_loop,
    only_logits,
    random_params,
    small_model,
)

from mor_jax.config import ModelConfig, RecursionConfig
from mor_jax.model.routing.capacity import routed_tokens, token_seats
from mor_jax.model.transformer import init_params

SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
STRATEGIES = ("recursion", "shared", "shared_update")
ROWS = ("whole", "packed")
BASE = {"expert": EXPERT, "token": TOKEN}


def _combinations(*axes: tuple[str, ...], default: set[tuple[str, ...]]) -> list[Any]:
    """All combinations; those outside ``default`` are slow."""
    found = list(itertools.product(*axes))
    assert default <= set(found)
    return [pytest.param(*c, id="-".join(c), marks=() if c in default else pytest.mark.slow) for c in found]


def _check(
    config: ModelConfig,
    rows: str,
    *,
    executions: tuple[Any, ...] = ("gather", "scan"),
    choose: Any = None,
    seed: int = 0,
    **arguments: Any,
) -> None:
    params, packed = random_params(config, seed), rows == "packed"
    plain = by_plain_loop(config, params, packed, choose)
    for execution in executions:
        ours = by_model(config, params, execution, packed, **arguments)
        assert_computes_the_same(ours, plain)


@pytest.mark.parametrize(
    ("sharing", "strategy", "rows"),
    _combinations(
        SHARINGS,
        STRATEGIES[:2],
        ROWS,
        default={("middle_sequence", "shared", "packed"), ("cycle", "shared", "whole")},
    ),
)
def test_recursive_models(sharing, strategy, rows):
    config = small_model(RecursionConfig(3, sharing, kv_strategy=strategy))
    # a sequence has one execution
    executions = ("gather",) if config.recursion.is_sequence else ("gather", "scan")
    # seed 0 of `sequence` draws a token whose state nearly vanishes: RMSNorm magnifies its rounding thirtyfold, and
    # both computations miss the logits in float64 there by about 1e-5
    _check(config, rows, executions=executions, seed=1 if sharing == "sequence" else 0)


@pytest.mark.parametrize(
    ("kind", "sharing", "strategy", "rows"),
    _combinations(
        ("expert", "token"),
        ("cycle", "middle_cycle"),
        STRATEGIES,
        ROWS,
        default={
            ("expert", "middle_cycle", "recursion", "packed"),
            ("expert", "cycle", "shared_update", "whole"),
            ("token", "cycle", "shared", "packed"),
        },
    ),
)
def test_mixtures_of_recursions(kind, sharing, strategy, rows):
    _check(small_model(RecursionConfig(3, sharing, kv_strategy=strategy), BASE[kind]), rows)


@pytest.mark.parametrize("strategy", ["recursion", *(pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES[1:])])
def test_token_choice_that_runs_out_of_seats(strategy):
    """Only `gather` has seats; the loop gives them to the earliest tokens of each row too."""
    routing = dataclasses.replace(TOKEN, capacity_slack=0.7)
    config = small_model(RecursionConfig(3, "cycle", kv_strategy=strategy), routing)
    seats = token_seats(config, LENGTH)
    assert seats == (12, 5, 2)
    params = random_params(config)
    free, limited = by_plain_loop(config, params, False), by_plain_loop(config, params, False, seats)
    assert np.sum(free[0][1]["depth"]) > np.sum(limited[0][1]["depth"])
    _check(config, "whole", executions=("gather",), choose=seats)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # router, changes of the routing, changes of the model or its recursion
    "expert-many": (
        "expert",
        {"router": "mlp", "residual": "plain", "sampling": "aux_router", "score": "tanh", "temperature": 2.0},
        {"share_norms": False, "tie_embeddings": False, "attend_across_documents": True},
    ),
    "token-many": (
        "token",
        {"router": "mlp", "residual": "plain", "score": "sigmoid", "alpha": 0.5, "temperature": 2.0},
        {"share_norms": False},
    ),
    "additive": ("expert", {"gating": "additive", "sampling": "none"}, {}),
    "additive-plain": ("expert", {"gating": "additive", "residual": "plain"}, {}),
    "token-additive": ("token", {"gating": "additive"}, {}),
    "wide_mlp": ("expert", {"router": "wide_mlp"}, {}),
    "token-wide_mlp": ("token", {"router": "wide_mlp"}, {}),
    "no score function": ("expert", {"score": "none"}, {}),
    "norms": ("expert", {}, {"share_norms": False}),
    "aux_router": ("expert", {"sampling": "aux_router"}, {}),
    "capacities": ("expert", {"capacities": (0.6, 0.5)}, {}),
    "capacities-shared": ("expert", {"capacities": (0.6, 0.5)}, {"kv_strategy": "shared"}),
    "multiple": ("expert", {"capacity_multiple": 5}, {}),
    "across documents": ("token", {}, {"attend_across_documents": True}),
    "restarting positions": ("expert", {}, {"attend_across_documents": True, "rotary_positions": "document"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.endswith("many") else pytest.mark.slow) for n in VARIANTS]
)
def test_variants_of_router_gate_and_norms(name):
    kind, routing_changes, changes = VARIANTS[name]
    of_recursion = {k: v for k, v in changes.items() if k in ("share_norms", "kv_strategy")}
    of_model = {k: v for k, v in changes.items() if k not in of_recursion}
    routing = dataclasses.replace(BASE[kind], **routing_changes)
    recursion = RecursionConfig(2, "middle_cycle", **of_recursion)
    _check(small_model(recursion, routing, **of_model), "packed")


@pytest.mark.slow
def test_a_random_router_selects_and_gates_by_its_noise():
    config = small_model(RecursionConfig(3, "cycle"), dataclasses.replace(EXPERT, random=True))
    key = jax.random.key(3)
    noise_RBT = jax.random.uniform(key, (3, 2, LENGTH))
    choose = plain_routing.TopK(routed_tokens(config, LENGTH), noise_RBT)
    params = random_params(config, 0)
    plain = by_plain_loop(config, params, False, choose)
    for execution in ("gather", "scan"):
        assert_close(by_model(config, params, execution, False, key=key), plain)
    assert not np.any(plain[1]["router"]["kernel"])  # its weights are not used


@pytest.mark.parametrize("strategy", ["shared", *(pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES[::2])])
def test_the_threshold_mode_computes_what_the_loop_does(strategy):
    boundaries = (0.0, -0.2, 0.1)
    routing = dataclasses.replace(EXPERT, boundaries=boundaries)
    config = small_model(RecursionConfig(3, "cycle", kv_strategy=strategy), routing)
    choose = plain_routing.threshold(config.capacities, boundaries)
    _check(config, "packed", executions=("scan",), choose=choose, mode="threshold")


def test_full_capacity_gate_one_and_plain_residual_is_the_recursive_transformer():
    """A router of zeros: the sigmoid is 1/2, the softmax over 3 depths 1/3; alpha makes the gate 1."""
    recursion = RecursionConfig(3, "cycle", kv_strategy="shared")
    recursive = small_model(recursion)
    params = random_params(recursive)
    expected = only_logits(recursive, params)
    everyone = {"residual": "plain", "capacities": (1.0, 1.0, 1.0)}
    expert = dataclasses.replace(EXPERT, alpha=2.0, **everyone)
    routed = params | {"router": {"kernel": jnp.zeros((3, 10, 1))}}
    np.testing.assert_allclose(only_logits(small_model(recursion, expert), routed), expected, atol=1e-5)
    token = dataclasses.replace(TOKEN, alpha=3.0, balancing="loss_free", **everyone)
    routed = params | {"router": {"kernel": jnp.zeros((10, 3))}}
    deepest = jnp.array([0.0, 0.0, 1.0])
    logits = only_logits(small_model(recursion, token), routed, router_bias_R=deepest)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_one_recursion_is_the_plain_transformer():
    plain = small_model(RecursionConfig(), num_layers=4)
    params = random_params(plain)
    expected = only_logits(plain, params)
    np.testing.assert_allclose(
        only_logits(small_model(RecursionConfig(1, "cycle"), num_layers=4), params), expected, atol=1e-5
    )
    layers = {"first": slice(0, 1), "block": slice(1, 3), "last": slice(3, 4)}
    split = {name: jax.tree.map(lambda leaf, s=s: leaf[s], params["block"]) for name, s in layers.items()}
    split |= {name: jax.tree.map(lambda leaf: leaf[0], split[name]) for name in ("first", "last")}
    middle = small_model(RecursionConfig(1, "middle_cycle"), num_layers=4)
    np.testing.assert_allclose(only_logits(middle, params | split), expected, atol=1e-5)


def test_a_cycle_is_the_plain_transformer_whose_layers_repeat():
    recursive, plain = small_model(RecursionConfig(3, "cycle")), small_model(RecursionConfig(), num_layers=6)
    params = random_params(recursive)
    repeated = params | {"block": jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3), params["block"])}
    np.testing.assert_allclose(only_logits(plain, repeated), only_logits(recursive, params), atol=1e-5)


@pytest.mark.parametrize("routing", [EXPERT, TOKEN], ids=["expert", "token"])
def test_parameters_of_the_block_do_not_depend_on_the_number_of_recursions(routing):
    def block(recursions: int) -> Any:
        config = small_model(RecursionConfig(recursions, "middle_cycle"), routing)
        params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return {name: tree for name, tree in params.items() if name != "router"}

    assert block(1) == block(2) == block(4)

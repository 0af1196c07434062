"""Where tokens go, against literal tables: models whose block changes nothing and whose router reads token ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import Execution, Mode, ModelConfig, RecursionConfig, ResolvedPerf, RoutingConfig
from mor_jax.model.parameters import Weights
from mor_jax.model.routing.trace import RoutingTrace
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk, init_params

VOCAB = 8
EXPERT = RoutingConfig("expert", residual="plain", score="none", alpha=1.0, capacities=(1.0, 0.75, 0.25))
TOKEN = RoutingConfig("token", score="softmax", alpha=1.0, capacities=(1.0, 0.5, 0.25))


def _model(routing: RoutingConfig, recursions: int = 3) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB, num_layers=recursions, d_model=VOCAB, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=4,
        context_length=8, dtype="float32", recursion=RecursionConfig(recursions, "cycle"), routing=routing,
    )  # fmt: skip


@functools.cache
def _fresh(model: ModelConfig):
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def _route(
    model: ModelConfig,
    table,
    tokens,
    execution: Execution = "gather",
    mode: Mode = "topk",
    *,
    segments=None,
    bias_R=None,
    **arguments,
) -> RoutingTrace:
    """Route rows of token ids; ``table[v]`` are the raw scores of token v, one per recursion (or depth)."""
    params = dict(_fresh(model))
    params["block"] = jax.tree.map(jnp.zeros_like, params["block"])  # block(x) = x
    params["embedding"] = {"embedding": jnp.eye(VOCAB)}
    kernel_VR = jnp.array(table, jnp.float32)
    params["router"] = {"kernel": kernel_VR.T[:, :, None] if model.routing.kind == "expert" else kernel_VR}

    @jax.jit
    def run(params):
        weights, rows = Weights(model, params, bias_R), Rows(jnp.array(tokens), segment_ids_BT=segments)
        return apply_trunk(weights, ResolvedPerf(execution=execution), rows, mode=mode, **arguments).trace

    trace = run(params)
    assert trace is not None
    return trace


SCORES = [  # by token id: recursion 1, 2, 3
    [0.0, 4.0, -1.0],
    [0.0, 3.0, 5.0],
    [0.0, 2.0, 2.0],
    [0.0, 1.0, 3.0],
    [0.0, -1.0, 4.0],
    [0.0, -2.0, 9.0],
    [0.0, -3.0, 9.0],
    [0.0, -4.0, 9.0],
]
ROWS = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_top_k_selects_among_the_tokens_still_active(execution):
    """8, 6 and 2 of 8: ids 6 and 7 leave at recursion 2, so their high scores at recursion 3 do not count."""
    trace = _route(_model(EXPERT), SCORES, ROWS, execution)
    np.testing.assert_array_equal(trace.depth_BT, [[2, 3, 2, 2, 2, 3, 1, 1], [1, 1, 3, 2, 2, 2, 3, 2]])
    np.testing.assert_array_equal(trace.active_RBT[2], trace.selected_RBT[1])
    assert bool(trace.active_RBT[0].all() and trace.active_RBT[1].all())
    np.testing.assert_array_equal(trace.scores_RBT[2, 0], [-1, 5, 2, 3, 4, 9, 0, 0])  # 0 where not active
    np.testing.assert_array_equal(trace.gates_RBT[2, 0], [0, 5, 0, 0, 0, 9, 0, 0])  # 0 where not selected
    found = trace.statistics
    np.testing.assert_allclose(found.tokens_per_depth, [0, 0.25, 0.5, 0.25])
    # recursion 2 took ids 4 and 5 with scores below 0; recursion 3 left ids 2, 3 and 4 behind with scores above
    np.testing.assert_allclose(found.threshold_accuracy_R, [1, 0.75, 0.5])
    np.testing.assert_allclose(found.dead_token_ratio, 0.5)  # positions 1, 5 and 2, 6 are used
    np.testing.assert_allclose(found.max_vio, 0.5)


def test_the_selection_comes_as_ascending_row_indices():
    trace = _route(_model(EXPERT), SCORES, ROWS)
    assert trace.selected is not None
    first, second, third = (np.asarray(index).tolist() for index in trace.selected)
    assert first == [[*range(8)]] * 2
    assert second == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]] and third == [[1, 5], [2, 6]]
    np.testing.assert_array_equal(trace.scores[2], [[-1, 5, 2, 3, 4, 9], [9, 4, 3, 2, 5, -1]])
    np.testing.assert_array_equal(trace.gates[2], [[5, 9], [9, 5]])


def test_threshold_lets_a_token_on_while_its_score_reaches_the_boundary():
    trace = _route(_model(EXPERT), SCORES, ROWS, mode="threshold")
    np.testing.assert_array_equal(trace.depth_BT, [[2, 3, 3, 3, 1, 1, 1, 1], [1, 1, 1, 1, 3, 3, 3, 2]])
    calibrated = _model(dataclasses.replace(EXPERT, boundaries=(0.0, 2.0, 2.5)))
    trace = _route(calibrated, SCORES, ROWS[:1], mode="threshold")
    np.testing.assert_array_equal(trace.depth_BT, [[2, 3, 2, 1, 1, 1, 1, 1]])
    assert trace.selected is None and np.shape(trace.gates) == (1, 8)


def test_a_threshold_also_holds_at_the_first_recursion_when_its_capacity_is_below_one():
    model = _model(dataclasses.replace(EXPERT, capacities=(0.5, 0.5), boundaries=(1.0, 2.0)), recursions=2)
    trace = _route(model, [row[1:] for row in SCORES], ROWS[:1], mode="threshold")
    np.testing.assert_array_equal(trace.depth_BT, [[1, 2, 2, 2, 0, 0, 0, 0]])


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_padding_takes_no_seat_and_counts_nowhere(execution):
    """Six tokens and two of padding: recursion 2 keeps the tokens, recursion 3 the best two of them."""
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    trace = _route(_model(EXPERT), SCORES, [[7, 6, 5, 4, 3, 2, 0, 1]], execution, segments=segments)
    np.testing.assert_array_equal(trace.depth_BT, [[3, 3, 2, 2, 2, 2, 1, 1]])
    np.testing.assert_allclose(trace.statistics.tokens_per_depth, [0, 0, 4 / 6, 2 / 6], rtol=1e-6)
    np.testing.assert_allclose(trace.statistics.threshold_accuracy_R, [1, 2 / 6, 2 / 6], rtol=1e-6)


DEPTHS = [[9.0 if depth == asked else 0.0 for depth in (1, 2, 3)] for asked in (1, 2, 3, 3, 1, 2, 3, 3)]
"""By token id: asks for 1, 2, 3, 3, 1, 2, 3, 3 passes."""


def test_seats_run_out_for_the_latest_tokens():
    """Of the six that ask for recursion 2 the first four get a seat; the two that go on to recursion 3 fill it."""
    trace = _route(_model(TOKEN), DEPTHS, ROWS[:1])
    np.testing.assert_array_equal(trace.depth_BT, [[1, 2, 3, 3, 1, 2, 1, 1]])
    np.testing.assert_allclose(trace.statistics.dropped, 2 / 8)
    np.testing.assert_allclose(trace.statistics.load_R, [2 / 8, 2 / 8, 4 / 8])  # what was asked for
    np.testing.assert_allclose(trace.statistics.tokens_per_depth, [0, 4 / 8, 2 / 8, 2 / 8])
    gate, other = np.exp(9) / (np.exp(9) + 2), 1 / (np.exp(9) + 2)
    np.testing.assert_allclose(
        np.asarray(trace.gates)[0], [gate] * 6 + [other] * 2, rtol=1e-5
    )  # of the depth of leaving


def test_scan_drops_nothing():
    trace = _route(_model(TOKEN), DEPTHS, ROWS[:1], "scan")
    np.testing.assert_array_equal(trace.depth_BT, [[1, 2, 3, 3, 1, 2, 3, 3]])
    assert float(trace.statistics.dropped) == 0.0


def test_a_token_dropped_at_a_deep_recursion_leaves_its_seat_to_nobody():
    """Row of ids 2 2 2 3 1 1 0 0: seats at recursion 2 go to the first four; two of them have one at recursion 3."""
    trace = _route(_model(TOKEN), DEPTHS, [[2, 2, 2, 3, 1, 1, 0, 0]])
    np.testing.assert_array_equal(trace.depth_BT, [[3, 3, 2, 2, 1, 1, 1, 1]])


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_padding_takes_no_seat_of_token_choice(execution):
    segments = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    trace = _route(_model(TOKEN), DEPTHS, [[0, 2, 3, 1, 4, 2, 2, 2]], execution, segments=segments)
    np.testing.assert_array_equal(trace.depth_BT, [[1, 3, 3, 2, 1, 1, 1, 1]])
    np.testing.assert_allclose(trace.statistics.load_R, [2 / 5, 1 / 5, 2 / 5], rtol=1e-6)


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_balance_warm_up_sends_every_token_through_every_recursion(execution):
    model = _model(dataclasses.replace(TOKEN, balance_warmup_steps=3))
    depths = [_route(model, DEPTHS, ROWS[:1], execution, step=step).depth_BT for step in (0, 1)]
    np.testing.assert_array_equal(depths, np.full((2, 1, 8), 3))
    after = _route(model, DEPTHS, ROWS[:1], execution, step=2).depth_BT
    np.testing.assert_array_equal(after, _route(model, DEPTHS, ROWS[:1], execution).depth_BT)


def test_the_loss_free_bias_moves_the_choice_but_not_the_gate():
    model = _model(dataclasses.replace(TOKEN, balancing="loss_free", capacities=(1.0, 1.0, 1.0)))
    trace = _route(model, DEPTHS, ROWS[:1], bias_R=jnp.array([0.0, 2.0, 0.0]))
    np.testing.assert_array_equal(trace.depth_BT, np.full((1, 8), 2))
    plain = np.exp(0) / (np.exp(9) + 2)
    np.testing.assert_allclose(np.asarray(trace.gates)[0, 0], plain, rtol=1e-5)


def test_a_random_router_follows_its_key_and_not_the_scores():
    """As released: uniform numbers choose, and times alpha they are the gates; no loss sees them."""
    model = _model(dataclasses.replace(EXPERT, random=True, alpha=0.5, score="sigmoid"))
    trace = _route(model, SCORES, ROWS, key=jax.random.key(0))
    noise_RBT = np.asarray(jax.random.uniform(jax.random.key(0), trace.gates_RBT.shape))
    np.testing.assert_allclose(trace.gates_RBT, np.where(trace.selected_RBT, 0.5 * noise_RBT, 0.0), rtol=1e-6)
    kept_T, left_T = noise_RBT[1, 0][trace.selected_RBT[1, 0]], noise_RBT[1, 0][~trace.selected_RBT[1, 0]]
    assert kept_T.min() > left_T.max() and float(trace.losses.sampling) == 0.0

    def depths(key, execution: Execution = "gather"):
        return np.asarray(_route(model, SCORES, ROWS, execution, key=jax.random.key(key)).depth_BT)

    assert [np.sort(row).tolist() for row in depths(0)] == [[1, 1, 2, 2, 2, 2, 3, 3]] * 2
    np.testing.assert_array_equal(depths(0), depths(0, "scan"))
    assert (depths(0) != depths(1)).any()

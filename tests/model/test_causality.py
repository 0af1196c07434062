"""What a token's logits depend on, by perturbation of its future and by gradient (paper section 2.2.1)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence_examples import EXPERT, TOKEN, VOCAB, random_params, small_model

from mor_jax.config import PLAIN, Mode, ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

LENGTH, SEEDS = 16, 3
SCARCE = dataclasses.replace(TOKEN, capacity_slack=0.75)
"""Token-choice with fewer seats than a balanced router needs: `gather` drops tokens."""
BOUNDED = dataclasses.replace(EXPERT, boundaries=(0.0, -0.3, 0.1))
ALL_STRATEGIES = pytest.mark.parametrize("strategy", ["recursion", "shared", "shared_update"])


@functools.partial(jax.jit, static_argnames=("config", "mode"))
def _run(config: ModelConfig, params: Any, tokens_BT: Any, mode: Mode) -> tuple[jax.Array, Any]:
    output = apply_trunk(Weights(config, params), PLAIN, Rows(tokens_BT), mode=mode)
    return output.hidden_BTD @ head_matrix(config, params).T, output.trace


def _futures(seed: int) -> np.ndarray:
    """A row, then for every t the same row with all tokens after t replaced by others: [T, T]."""
    generator = np.random.default_rng(seed)
    row_T = generator.integers(0, VOCAB, LENGTH)
    other_TT = (row_T[None] + generator.integers(1, VOCAB, (LENGTH - 1, LENGTH))) % VOCAB
    is_future = np.arange(LENGTH)[None, :] > np.arange(LENGTH - 1)[:, None]
    return np.concatenate([row_T[None], np.where(is_future, other_TT, row_T[None])]).astype(np.int32)


def _changes(config: ModelConfig, mode: Mode) -> tuple[float, float, Any]:
    """Largest change of the logits up to t, smallest of those after t, over all t and seeds; and the traces."""
    before, after, traces = [], [], []
    for seed in range(SEEDS):
        logits_TTV, trace = _run(config, random_params(config, seed), _futures(seed), mode)
        difference = np.abs(np.asarray(logits_TTV[1:] - logits_TTV[:1])).max(axis=-1)
        for t, change_T in enumerate(difference):
            before.append(change_T[: t + 1].max())
            after.append(change_T[t + 1 :].max())
        traces.append(trace)
    return max(before), min(after), traces


def _model(routing: RoutingConfig, strategy: Any = "recursion") -> ModelConfig:
    return small_model(RecursionConfig(3, "cycle", kv_strategy=strategy), routing, num_layers=3)


@ALL_STRATEGIES
def test_under_threshold_expert_choice_does_not_see_the_future(strategy):
    config = _model(BOUNDED, strategy)
    before, after, traces = _changes(config, "threshold")
    assert before < 1e-5 and after > 1e-2
    depths = np.concatenate([np.unique(trace.depth_BT) for trace in traces])
    assert set(depths) == {1, 2, 3}  # tokens do leave at every depth


@ALL_STRATEGIES
def test_token_choice_never_sees_the_future_even_when_seats_run_out(strategy):
    config = _model(SCARCE, strategy)
    before, after, traces = _changes(config, "topk")
    assert before < 1e-5 and after > 1e-2
    for trace in traces:
        assert float(trace.statistics.dropped) > 0.05


def test_top_k_of_the_same_models_looks_ahead():
    """Under the same perturbations top-k changes, for some t, what came before."""
    config = _model(EXPERT)
    before, _, _ = _changes(config, "topk")
    assert before > 1e-2


def test_top_k_lets_later_tokens_take_a_place_away():
    """Half of a row is selected, by token id. Low ids follow, then high ones: the first half is in, then out.

    The logits of the first half change although no token of it did; under threshold they stay.
    """
    routing = dataclasses.replace(EXPERT, capacities=(0.5, 0.25, 0.25), boundaries=(0.45, 0.0, 0.0))
    config = _model(routing)
    params = dict(random_params(config))
    embedding_VD = params["embedding"]["embedding"].at[:, 0].set(jnp.arange(VOCAB) / 10)
    params["embedding"] = {"embedding": embedding_VD}
    params["router"] = {"kernel": params["router"]["kernel"].at[0, :, 0].set(jnp.eye(10)[0])}
    tokens_BT = np.array([[5] * 8 + [1] * 8, [5] * 8 + [9] * 8], np.int32)
    logits_BTV, trace = _run(config, params, tokens_BT, "topk")
    np.testing.assert_array_equal(
        np.asarray(trace.selected_RBT[0]), [[True] * 8 + [False] * 8, [False] * 8 + [True] * 8]
    )
    changed_T = np.abs(np.asarray(logits_BTV[0] - logits_BTV[1])).max(axis=-1)
    assert changed_T[:8].min() > 1e-3
    logits_BTV, trace = _run(config, params, tokens_BT, "threshold")
    assert bool(trace.selected_RBT[0, :, :8].all())
    np.testing.assert_allclose(logits_BTV[0, :8], logits_BTV[1, :8], atol=1e-5)


@pytest.mark.parametrize(
    ("routing", "strategy", "mode"),
    [(BOUNDED, "shared", "threshold"), (EXPERT, "recursion", "topk"), (SCARCE, "shared_update", "topk")],
    ids=["threshold", "topk", "token"],
)
def test_gradients_reach_the_past_and_only_the_past(routing, strategy, mode):
    """Criterion: the derivative of position t's hidden state by the embedding of token s is exactly zero for s > t and
    not zero for s <= t.

    It holds for top-k as well: selection is discrete, so a gradient cannot see its look-ahead. That is what the
    perturbation tests are for.
    """
    config = dataclasses.replace(_model(routing, strategy), vocab_size=LENGTH, tie_embeddings=False)
    params = random_params(config)
    tokens_BT = jnp.asarray(np.random.default_rng(0).permutation(LENGTH)[None], jnp.int32)  # one embedding per position

    @jax.jit
    def sensitivity(params: Any) -> jax.Array:
        weights_D = jax.random.normal(jax.random.key(1), (config.d_model,))

        def states(embedding_VD: jax.Array) -> jax.Array:
            changed = params | {"embedding": {"embedding": embedding_VD}}
            output = apply_trunk(Weights(config, changed), PLAIN, Rows(tokens_BT), mode=mode)
            return output.hidden_BTD[0] @ weights_D

        by_embedding_TVD = jax.jacrev(states)(params["embedding"]["embedding"])
        return jnp.abs(by_embedding_TVD[:, tokens_BT[0]]).max(axis=-1)

    reached_TS = np.asarray(sensitivity(params))
    past = np.tril(np.ones((LENGTH, LENGTH), bool))
    assert reached_TS[past].min() > 1e-7
    assert reached_TS[~past].max() == 0.0

"""The public forward call: labels, normaliser, losses, trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.model.forward import ModelOutput, forward
from mor_jax.model.transformer import init_params

VANILLA = ModelConfig(
    vocab_size=17, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=8,
    dtype="float32", init_std=0.3,
)  # fmt: skip
EXPERT = dataclasses.replace(
    VANILLA,
    recursion=RecursionConfig(2, "cycle"),
    routing=RoutingConfig("expert", capacity_warmup_steps=4, z_loss_coefficient=0.5, sampling_coefficient=0.25),
)
TOKEN = dataclasses.replace(
    VANILLA,
    num_layers=4,
    recursion=RecursionConfig(2, "middle_cycle"),
    routing=RoutingConfig("token", score="softmax", alpha=1.0, balancing_coefficient=0.5),
)
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (2, 8)).astype(np.int32)


@functools.cache
def _params(config: ModelConfig):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(1))


def _forward(config: ModelConfig, params, **arguments) -> ModelOutput:
    return jax.jit(lambda params: forward(config, params, TOKENS_BT, **arguments))(params)


def _hand_nll(logits_BTV: jax.Array, labels_BT: np.ndarray) -> tuple[float, int]:
    """Summed cross-entropy in float64 and the number of targets."""
    logits = np.asarray(logits_BTV, np.float64)[:, :-1]
    lse_BT = np.log(np.exp(logits).sum(-1))
    targets_BT = labels_BT[:, 1:]
    picked_BT = np.take_along_axis(logits, np.maximum(targets_BT, 0)[..., None], -1)[..., 0]
    counted_BT = targets_BT != -100
    return float(((lse_BT - picked_BT) * counted_BT).sum()), int(counted_BT.sum())


def test_labels_are_shifted_inside_and_the_mean_is_over_targets():
    params = _params(VANILLA)
    output = _forward(VANILLA, params)
    nll, count = _hand_nll(output.logits, TOKENS_BT)
    assert count == 14
    np.testing.assert_allclose(output.losses["lm"], nll / count, rtol=1e-6)
    assert output.losses.keys() == {"lm", "total"}
    assert output.trace is None and output.hidden is None


def test_ignored_labels_segments_and_normalizer():
    labels_BT = TOKENS_BT.copy()
    labels_BT[0, 3] = -100
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1] * 8], np.int32)
    params = _params(VANILLA)
    output = _forward(VANILLA, params, labels=labels_BT, segment_ids=segments_BT, loss_normalizer=100.0)
    expected_BT = labels_BT.copy()
    expected_BT[0, 6:] = -100
    nll, count = _hand_nll(output.logits, expected_BT)
    assert count == 11
    np.testing.assert_allclose(output.losses["lm"], nll / 100, rtol=1e-6)
    split = dataclasses.replace(VANILLA, attend_across_documents=False)
    output = _forward(split, params, labels=labels_BT, segment_ids=segments_BT)
    expected_BT[0, 4] = -100
    nll, count = _hand_nll(output.logits, expected_BT)
    np.testing.assert_allclose(output.losses["lm"], nll / count, rtol=1e-6)


@pytest.mark.parametrize(("config", "router_loss"), [(EXPERT, "sampling"), (TOKEN, "balancing")])
def test_total_is_the_weighted_sum_and_the_normalizer_scales_the_router_losses(config, router_loss):
    params = _params(config)
    run = jax.jit(lambda normalizer: forward(config, params, TOKENS_BT, loss_normalizer=normalizer).losses)
    one, other = run(16.0), run(32.0)
    routing = config.routing
    coefficients = {
        "lm": 1.0,
        "sampling": routing.sampling_coefficient,
        "balancing": routing.balancing_coefficient,
        "router_z": routing.z_loss_coefficient,
    }
    assert router_loss in one
    assert ("router_z" in one) == (config is EXPERT)
    total = sum(coefficients[name] * value for name, value in one.items() if name != "total")
    np.testing.assert_allclose(one["total"], total, rtol=1e-6)
    ratios = {name: float(one[name] / other[name]) for name in one if name != "total"}
    expected = {"lm": 2.0, "sampling": 1.0, "balancing": 2.0, "router_z": 2.0}
    assert ratios == pytest.approx({name: expected[name] for name in ratios})


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_warm_up_follows_the_one_based_step_in_training_only(execution):
    params = _params(EXPERT)

    def counts(**arguments) -> list[int]:
        trace = _forward(EXPERT, params, execution=execution, **arguments).trace
        assert trace is not None and trace.selected is not None
        for rows_BC, mask_BT in zip(trace.selected, trace.selected_RBT, strict=True):
            assert all(np.array_equal(r, np.flatnonzero(m)) for r, m in zip(rows_BC, np.asarray(mask_BT), strict=True))
        return [rows_BC.shape[1] for rows_BC in trace.selected]

    assert counts() == [8, 4]
    assert counts(step=1) == [8, 4]
    assert counts(step=1, train=True) == [8, 7]  # 8 * (0.5 + 0.5 * 0.5 * (1 + cos(pi / 4)))
    assert counts(step=np.int32(4), train=True) == [8, 4]
    assert counts(train=True) == [8, 4]


def test_a_traced_step_works_under_scan():
    params = _params(EXPERT)

    @jax.jit
    def run(step):
        output = forward(EXPERT, params, TOKENS_BT, train=True, step=step, execution="scan")
        assert output.trace is not None and output.trace.selected is None
        return output.logits

    expected = _forward(EXPERT, params, train=True, step=1).logits
    np.testing.assert_allclose(run(jnp.asarray(1)), expected, atol=1e-5)
    assert np.abs(run(jnp.asarray(4)) - expected).max() > 1e-4


def test_hidden_stages_and_depths_are_returned():
    params = _params(TOKEN)
    output = _forward(TOKEN, params, return_hidden=True)
    assert output.hidden is not None and output.trace is not None
    assert output.hidden.first is not None and len(output.hidden.recursions) == 2
    logits_BTV = output.hidden.norm @ params["embedding"]["embedding"].T
    np.testing.assert_allclose(output.logits, logits_BTV, atol=1e-5)
    assert output.trace.selected is None
    assert set(np.unique(output.trace.depth_BT)) <= {1, 2}
    threshold = _forward(EXPERT, _params(EXPERT), mode="threshold").trace
    assert threshold is not None and threshold.selected is None


def test_the_router_state_moves_the_choice():
    config = dataclasses.replace(TOKEN, routing=dataclasses.replace(TOKEN.routing, balancing="loss_free"))
    params = _params(config)
    for bias, depth in (([9.0, 0.0], 1), ([0.0, 9.0], 2)):
        biased = params | {"router_state": {"bias": np.array(bias, np.float32)}}
        trace = _forward(config, biased, execution="scan").trace
        assert trace is not None and np.all(np.asarray(trace.depth_BT) == depth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": TOKENS_BT[:, 1:]}, r"labels has shape \(2, 7\)"),
        ({"attention_mask": np.ones(8, np.int32)}, r"attention_mask has shape \(8,\)"),
        ({"execution": "fast"}, "execution='fast' is not one of"),
        ({"mode": "greedy"}, "mode='greedy' is not one of"),
        ({"step": 0, "train": True}, "step=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        forward(VANILLA, _params(VANILLA), TOKENS_BT, **arguments)

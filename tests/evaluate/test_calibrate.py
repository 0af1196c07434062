"""Calibrated boundaries let as many tokens pass as top-k does, and give a recipe without a boundary a causal mode."""

import dataclasses

import jax
import numpy as np
import pytest
from evaluation_examples import batch, config, params, weights

from mor_jax.config import PLAIN
from mor_jax.errors import UserError
from mor_jax.evaluate.calibrate import _cut, calibrate, with_boundaries
from mor_jax.evaluate.passes import batch_trace
from mor_jax.model.parameters import Weights
from mor_jax.model.routing.boundaries import boundary_refusal
from mor_jax.model.rows import Rows


def test_a_cut_is_halfway_between_what_is_in_and_what_is_out():
    scores = np.array([3.0, 1.0, 2.0, 5.0])
    assert [_cut(scores, count) for count in (1, 2, 4)] == [4.0, 2.5, 1.0]


def test_as_many_tokens_pass_as_by_topk():
    cfg = config(sampling="none")
    assert boundary_refusal(cfg.model)
    batches = [batch(seed, rows=8) for seed in range(3)]
    boundaries = calibrate(weights(cfg), cfg.perf, batches)
    fixed = with_boundaries(cfg, boundaries)
    assert boundaries[0] == 0.0 and boundary_refusal(fixed.model) is None  # the first recursion takes all
    running = dataclasses.replace(weights(cfg), boundaries_R=np.array(boundaries, np.float32))
    assert boundary_refusal(cfg.model, running.boundaries_R) is None
    shares = {}
    for name, model, mode in (
        ("topk", weights(cfg), "topk"),
        ("threshold", Weights(fixed.model, params(cfg)), "threshold"),
        ("running", running, "threshold"),
    ):
        traces = [batch_trace(model, PLAIN, mode, Rows.of_batch(b), jax.random.key(0)) for b in batches]
        depths = [np.asarray(trace.depth_BT) for trace in traces]
        shares[name] = np.mean(np.concatenate(depths) == 2)
    assert shares["topk"] == 0.5
    np.testing.assert_allclose(shares["threshold"], 0.5, atol=1 / (3 * 8 * 16))
    assert shares["running"] == shares["threshold"]


def test_what_has_no_boundary_to_calibrate_is_refused():
    for cfg, message in (
        (config("token"), "not routing.kind='token'"),
        (config(sampling="none", random=True), "random=True selects"),
        (config(sampling="aux_router"), "second router"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate(Weights(cfg.model, {}), cfg.perf, [])
    assert dataclasses.asdict(config().model)["routing"]["boundaries"] is None

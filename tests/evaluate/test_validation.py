"""Held-out losses against plain sums over an unfused forward pass."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import Bytes, HeldOut, T, batch, config, params, weights

from mor_jax.config import PLAIN, MeshConfig, Mode
from mor_jax.errors import UserError
from mor_jax.evaluate.passes import batch_totals, spread
from mor_jax.evaluate.validation import modes_of, summary, threshold_refusal, validation_losses
from mor_jax.mesh.mesh import make_mesh, params_shardings
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk, logical_axes

ZERO_BIAS = jnp.zeros(2)


def _plain(cfg, batches: Sequence, mode: Mode, *, within_documents: bool = False):
    """(nats, targets, bytes) summed by hand over whole logits, and the traces."""

    @jax.jit
    def forward(rows):
        output = apply_trunk(weights(cfg, ZERO_BIAS), PLAIN, Rows.of_batch(rows), mode=mode)
        return jax.nn.log_softmax(output.hidden_BTD @ head_matrix(cfg.model, params(cfg)).T), output.trace

    nats, targets, size, traces = 0.0, 0, 0, []
    for rows in batches:
        log_BTV, trace = jax.device_get(forward(rows))
        for b, t in np.ndindex(*log_BTV.shape[:2]):
            now, following = rows["segment_ids"][b, t : t + 2]
            crosses = cfg.model.attend_across_documents and not within_documents
            if following and (crosses or now == following):
                target = rows["tokens"][b, t + 1]
                nats -= float(log_BTV[b, t, target])
                targets += 1
                size += len(Bytes().token_bytes(int(target)))
        traces.append(trace)
    return nats, targets, size, traces


@pytest.mark.parametrize(("kind", "across"), [("expert", True), ("expert", False), ("token", True)])
def test_both_modes_equal_plain_sums(kind, across):
    cfg = config(kind, across=across)
    batches = [batch(0), batch(1, padding=3)]
    losses = validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(*batches), 4)
    assert modes_of(weights(cfg)) == ("topk", "threshold")
    for mode in modes_of(weights(cfg)):
        nats, targets, size, _ = _plain(cfg, batches, mode)
        assert (losses["validation_tokens"], losses["validation_bytes"]) == (targets, size)
        np.testing.assert_allclose(losses[f"validation_{mode}_nll"], nats / targets, rtol=1e-5)
        np.testing.assert_allclose(losses[f"validation_{mode}_bits_per_byte"], nats / math.log(2) / size, rtol=1e-5)
        np.testing.assert_allclose(sum(losses[f"validation_{mode}_tokens_per_depth"]), 1.0)
    gap = losses["validation_threshold_nll"] - losses["validation_topk_nll"]
    assert losses["validation_gap"] == gap
    assert ("validation_topk_dropped" in losses) == (kind == "token")
    assert all(isinstance(v, int | float | list) for v in losses.values())  # writers take numbers and lists of them


def test_a_model_is_measured_on_the_targets_of_one_with_masked_documents():
    across, masked = config("none"), config("none", across=False)
    batches = [batch(0), batch(1, padding=3)]
    found = validation_losses(weights(across), across.perf, HeldOut(*batches), 4, within_documents=True)
    other = validation_losses(weights(masked), masked.perf, HeldOut(*batches), 4)
    nats, targets, size, _ = _plain(across, batches, "topk", within_documents=True)
    for name, value in (("validation_tokens", targets), ("validation_bytes", size)):
        assert found[name] == other[name] == value
    np.testing.assert_allclose(found["validation_nll"], nats / targets, rtol=1e-5)
    assert abs(found["validation_nll"] - other["validation_nll"]) > 1e-3  # it still sees the documents before


def test_routing_figures_are_counted_over_all_rows():
    cfg = config()
    batches = [batch(0), batch(1, padding=3)]
    losses = validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(*batches), 4)
    *_, traces = _plain(cfg, batches, "topk")
    counted = np.concatenate([b["segment_ids"][:, :-1] > 0 for b in batches])
    depth = np.concatenate([t.depth_BT for t in traces])
    selected = np.concatenate([t.selected_RBT for t in traces], axis=1) & counted
    active = np.concatenate([t.active_RBT for t in traces], axis=1) & counted
    raw = np.concatenate([t.scores_RBT for t in traces], axis=1)
    np.testing.assert_allclose(
        losses["validation_topk_tokens_per_depth"], np.bincount(depth[counted], minlength=3) / counted.sum()
    )
    assert losses["validation_topk_dead_token_ratio"] == 1 - selected[1].any(axis=0).mean()
    second = ((raw[1] >= 0) == selected[1])[active[1]].mean()
    np.testing.assert_allclose(losses["validation_threshold_accuracy"], [1.0, second], rtol=1e-6)


def test_dead_token_ratio_falls_with_more_rows():
    cfg = config(capacities=(1.0, 0.07))  # one of sixteen positions per row goes on
    one = validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(batch(0, 1)), 1)
    many = validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(*(batch(i, 1) for i in range(12))), 12)
    assert one["validation_topk_dead_token_ratio"] == 15 / 16
    assert many["validation_topk_dead_token_ratio"] < 15 / 16


@pytest.mark.parametrize("routing", [{"random": True}, {"sampling": "none"}])
def test_without_a_boundary_threshold_is_left_out_and_said(routing):
    cfg = config(**routing)
    losses = validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(batch(0)), 2)
    assert "validation_topk_nll" in losses
    assert not [k for k in losses if "threshold" in k or "gap" in k]
    assert "boundar" in str(threshold_refusal(weights(cfg)))
    assert "threshold refused" in summary(weights(cfg), losses)
    calibrated = config(boundaries=(0.0, 0.1), **routing)  # which random numbers do not heed
    assert (threshold_refusal(weights(calibrated)) is None) is not cfg.model.routing.random


def test_without_a_router_there_is_one_loss():
    cfg = config("none")
    losses = validation_losses(weights(cfg), cfg.perf, HeldOut(batch(0)), 2)
    nats, targets, size, _ = _plain(cfg, [batch(0)], "topk")
    assert set(losses) == {"validation_tokens", "validation_bytes", "validation_nll", "validation_bits_per_byte"}
    np.testing.assert_allclose(losses["validation_nll"], nats / targets, rtol=1e-5)
    np.testing.assert_allclose(losses["validation_bits_per_byte"], nats / math.log(2) / size, rtol=1e-5)
    assert summary(weights(cfg), losses).startswith(f"{losses['validation_nll']:.4f} nats/token")


def test_summary_says_which_mode_looks_ahead():
    cfg = config()
    text = summary(weights(cfg), validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(batch(0)), 2))
    assert "bits/byte (looks ahead)" in text and "bits/byte (causal)" in text and "gap" in text


def test_rows_are_rounded_up_to_whole_batches_and_no_more_are_read():
    cfg = config("none")
    three, two = (
        validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, HeldOut(*map(batch, range(5))), n) for n in (3, 2)
    )
    assert three["validation_tokens"] == 2 * two["validation_tokens"] == 4 * 16


def test_one_compilation_serves_all_batches():
    compiled: Any = batch_totals
    cfg, before = config("none", sharing="none", across=False, num_layers=3), compiled._cache_size()
    for _ in range(2):
        validation_losses(weights(cfg), cfg.perf, HeldOut(*map(batch, range(3))), 6)
    assert compiled._cache_size() == before + 1


def test_parameters_on_a_mesh_give_the_same_losses():
    cfg = config()
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    sharded = jax.device_put(params(cfg), params_shardings(mesh, logical_axes(cfg.model)))
    spread_batch: Any = spread(sharded, batch(0))
    assert not spread_batch["tokens"].is_fully_replicated
    assert spread(sharded, batch(0, rows=3))["tokens"].shape == (3, T + 1)  # two devices cannot share three rows
    rows = HeldOut(batch(0), batch(1, padding=3))
    models = (Weights(cfg.model, sharded, ZERO_BIAS), weights(cfg, ZERO_BIAS))
    there, here = (validation_losses(model, cfg.perf, rows, 4) for model in models)
    assert there.keys() == here.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_text_is_the_users_mistake():
    cfg = config("none")
    for dataset, rows in ((HeldOut(), 2), (HeldOut(batch(0, padding=17)), 2), (HeldOut(batch(0)), 0)):
        with pytest.raises(UserError):
            validation_losses(weights(cfg, ZERO_BIAS), cfg.perf, dataset, rows)

"""What heads attend to, against literal values of uniform attention and against a plain computation from the states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import T, batch, config, params, weights

from mor_jax.config import PartsConfig, PerfConfig
from mor_jax.errors import UserError
from mor_jax.evaluate.attention_by_pass import FIGURES, attention_by_pass
from mor_jax.kernels.norm import rms_norm
from mor_jax.kernels.rotary import apply_rotary, rotary_tables
from mor_jax.model.forward import forward
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows


def test_uniform_attention_has_its_literal_figures():
    cfg = config("none")
    blind = jax.tree.map(lambda a: a, params(cfg))
    blind["block"]["attention"]["query"] *= 0.0
    rows = Rows.of_batch(batch(0))
    passes = attention_by_pass(Weights(cfg.model, blind), cfg.perf, [rows, rows], "topk")
    seen = np.arange(2, T + 1)  # keys of every query but the first, which sees itself only
    for found in passes:
        assert found["queries"] == 2 * 2 * (T - 1) and found["keys"] == pytest.approx(seen.mean())
        expected = {
            "entropy": np.log(seen).mean(),
            "distance": ((seen - 1) / 2).mean(),
            "first": (1 / seen).mean(),
            "itself": (1 / seen).mean(),
        }
        for name in FIGURES:
            np.testing.assert_allclose(found["layers"][0][name], [expected[name]] * 2, rtol=1e-5)


PARTS = PartsConfig(qk_norm=True)


@pytest.mark.parametrize(
    ("kind", "strategy", "across", "rotary_positions", "parts"),
    [
        ("expert", "recursion", True, "document", PartsConfig()),
        ("expert", "shared", True, "row", PartsConfig()),
        ("none", "shared", False, "document", PartsConfig()),
        pytest.param("expert", "recursion", True, "row", PARTS, marks=pytest.mark.slow),
    ],
)
def test_a_pass_attends_as_computed_from_the_states_before_it(kind, strategy, across, rotary_positions, parts):
    cfg = config(kind, sharing="middle_cycle", num_layers=4, across=across)
    recursion = dataclasses.replace(cfg.model.recursion, kv_strategy=strategy)
    model = dataclasses.replace(cfg.model, recursion=recursion, rotary_positions=rotary_positions, parts=parts)
    cfg = dataclasses.replace(cfg, model=model)
    tree = dict(params(cfg))
    mode = "threshold" if kind == "expert" else "topk"
    rows = Rows.of_batch(batch(1, padding=2))
    passes = attention_by_pass(dataclasses.replace(weights(cfg), params=tree), cfg.perf, [rows], mode)
    segments, positions = np.asarray(rows.segment_ids_BT), np.asarray(rows.positions_BT)
    given = {"mode": mode, "positions": positions, "segment_ids": segments, "return_hidden": True}
    out = jax.jit(lambda params: forward(cfg.model, params, rows.tokens_BT, **given))(tree)
    assert out.hidden is not None and out.hidden.first is not None
    layer = jax.tree.map(lambda a: a[0], tree["block"])
    selected = np.ones((2, 2, T), bool) if out.trace is None else np.asarray(out.trace.selected_RBT)
    places = positions if rotary_positions == "document" else np.tile(np.arange(T, dtype=np.int32), (2, 1))
    rotary = rotary_tables(jnp.asarray(places), cfg.model.head_dim, cfg.model.rope_theta)

    def normed(states):
        return rms_norm(states, layer["attention_norm"]["scale"], cfg.model.norm_epsilon)

    def rotated(x):
        ones = jnp.ones((1, 1, 1, x.shape[-1]))  # fresh scales
        return apply_rotary(rms_norm(x, ones, cfg.model.norm_epsilon) if parts.qk_norm else x, rotary)

    second = np.where(selected[0][..., None], out.hidden.recursions[0], out.hidden.first)
    own = out.hidden.first if strategy == "shared" else second
    query = rotated(jnp.einsum("BTD,DNH->BTNH", normed(second), layer["attention"]["query"]))
    keys = rotated(jnp.einsum("BTD,DKH->BTKH", normed(own), layer["attention"]["key_value"][:, 0]))
    scores = np.einsum("BTNH,BSKH->BNTS", query, keys) * cfg.model.head_dim**-0.5  # one key/value head
    mask = np.tril(np.ones((T, T), bool))[None] & np.ones((2, 1, 1), bool)
    if strategy == "recursion":
        mask = mask & selected[1][:, None, :]
    if not across:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    entropies, firsts, distances = [], [], []
    for b in range(2):
        for t in range(T):
            if selected[1][b, t] and segments[b, t] and mask[b, t].sum() > 1:
                exponentials = np.exp(scores[b, :, t]) * mask[b, t]
                p = exponentials / exponentials.sum(-1, keepdims=True)
                entropies.append(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1))
                firsts.append(p[:, np.flatnonzero(mask[b, t])[0]])
                distances.append((p * (t - np.arange(T))).sum(-1))
    assert passes[1]["queries"] == len(entropies) > 0
    for name, values in (("entropy", entropies), ("first", firsts), ("distance", distances)):
        np.testing.assert_allclose(passes[1]["layers"][0][name], np.mean(values, 0), rtol=2e-4)


def test_a_share_of_the_first_values_changes_where_later_layers_look():
    cfg = config("none", sharing="none", num_layers=3)
    model = dataclasses.replace(cfg.model, parts=PartsConfig(value_residual=True))
    cfg = dataclasses.replace(cfg, model=model)
    tree, rows = dict(params(cfg)), Rows.of_batch(batch(1))

    def entropies(model, tree):
        found = attention_by_pass(Weights(model, tree), cfg.perf, [rows], "topk")
        return [layer["entropy"] for layer in found[0]["layers"]]

    shares = tree.pop("value_residual")
    without = entropies(dataclasses.replace(model, parts=PartsConfig()), tree)
    none = jax.tree.map(jnp.zeros_like, shares)
    np.testing.assert_allclose(entropies(model, tree | {"value_residual": none}), without, rtol=1e-6)
    mixed = entropies(model, tree | {"value_residual": shares})
    np.testing.assert_allclose(mixed[:1], without[:1], rtol=1e-6)
    assert np.abs(np.subtract(mixed[1:], without[1:])).max() > 1e-6


def test_layers_repeated_in_place_make_no_passes():
    with pytest.raises(UserError, match="has no block passes"):
        attention_by_pass(Weights(config("none", sharing="sequence").model, {}), PerfConfig(), [], "topk")

"""Causal scores: what else is in the batch, how rows are padded, and how many devices there are change nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import Bytes, T, config, params, weights

from mor_jax.config import ResolvedPerf
from mor_jax.data.packing import Row, expand_row
from mor_jax.errors import UserError
from mor_jax.evaluate.scoring import Scorer, causal_mode
from mor_jax.model.parameters import head_matrix
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

RECIPES = [("expert", {}), ("token", {}), ("none", {})]


def _batch(*texts, length=T):
    rows = [expand_row(Row(np.array(text, np.int32), np.array([0])), length + 1) for text in texts]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _text(seed, length=T + 1):
    return np.random.default_rng(seed).integers(0, 256, length)


@pytest.mark.parametrize(("kind", "routing"), RECIPES)
def test_scores_are_those_of_a_plain_forward_pass(kind, routing):
    cfg = config(kind, sharing="none" if kind == "none" else "cycle", **routing)
    scores = Scorer(weights(cfg, jnp.zeros(2)), cfg.perf, all_devices=False)(_batch(_text(0), _text(1)))
    for row in range(2):
        tokens = jnp.asarray(_text(row))[None]
        scan = ResolvedPerf(execution="scan")
        mode = "threshold" if kind == "expert" else "topk"
        hidden = apply_trunk(weights(cfg), scan, Rows(tokens[:, :-1]), mode=mode).hidden_BTD[0]
        logits = np.asarray(hidden @ head_matrix(cfg.model, params(cfg)).T, np.float64)
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(T), _text(row)[1:]]
        np.testing.assert_allclose(scores.nll_BT[row], nll, rtol=1e-4)
        np.testing.assert_array_equal(scores.greedy_BT[row], logits.argmax(-1))


@pytest.mark.parametrize(("kind", "routing"), RECIPES)
def test_neither_company_nor_the_future_nor_padding_changes_a_score(kind, routing):
    cfg = config(kind, sharing="none" if kind == "none" else "cycle", **routing)
    scorer = Scorer(weights(cfg, jnp.zeros(2)), cfg.perf, all_devices=False)
    alone = scorer(_batch(_text(0), [])).nll_BT[0]
    crowded = scorer(_batch(_text(0), _text(1)))
    np.testing.assert_array_equal(crowded.nll_BT[0], alone)  # bit for bit
    np.testing.assert_array_equal(scorer(_batch(_text(2), _text(0))).nll_BT[1], alone)
    changed = np.concatenate([_text(0)[:9], _text(3)[9:]])
    np.testing.assert_array_equal(scorer(_batch(changed, [])).nll_BT[0][:8], alone[:8])
    short = scorer(_batch(_text(0)[:9], [])).nll_BT[0]
    np.testing.assert_array_equal(short[:8], alone[:8])
    np.testing.assert_allclose(scorer(_batch(_text(0)[:9], [], length=8)).nll_BT[0], alone[:8], rtol=1e-5)


def test_rows_are_spread_over_all_devices():
    cfg = config()
    batch = _batch(*(_text(seed) for seed in range(8)))
    one, eight = (Scorer(weights(cfg), cfg.perf, all_devices=many) for many in (False, True))
    assert (one.devices, eight.devices) == (1, 8)
    np.testing.assert_allclose(eight(batch).nll_BT, one(batch).nll_BT, rtol=1e-5)


def test_a_recipe_without_a_boundary_cannot_be_scored():
    assert causal_mode(weights(config())) == "threshold"
    assert causal_mode(weights(config("token"))) == causal_mode(weights(config("none", sharing="none"))) == "topk"
    with pytest.raises(UserError, match=r"cannot be scored causally: model\.routing.sampling='none'"):
        causal_mode(weights(config(sampling="none")))
    assert Bytes().vocab_size < config().model.vocab_size  # the head has entries that no text holds

"""Draws depend on seed and position alone, follow the softmax, and cuts leave the tokens that they should."""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.infer import sampling
from mor_jax.infer.sampling import SamplingRows, _noise

VOCABULARY = 40
sample = jax.jit(sampling.sample, static_argnames=("known_tokens", "cuts"))


def _rows(seeds, temperature=1.0, top_k=0, top_p=1.0):
    whole = jnp.ones(len(seeds))
    return SamplingRows(
        temperature * whole, jnp.asarray(top_k * whole, jnp.int32), top_p * whole, jnp.asarray(seeds, jnp.uint32)
    )


def _logits(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, VOCABULARY)), jnp.float32)


def test_noise_is_gumbel():
    seeds, positions = jnp.arange(2, dtype=jnp.uint32), jnp.array([7, 7])
    noise, other = np.asarray(_noise(_rows(seeds), positions, 200_000))
    for one in (noise, other):
        assert np.isfinite(one).all()
        assert abs(one.mean() - np.euler_gamma) < 0.01
        assert abs(one.var() - np.pi**2 / 6) < 0.03
        assert len(np.unique(np.sort(one)[-1000:])) == 1000  # the best of a large vocabulary do not tie
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.01


def test_a_draw_is_repeated_by_seed_and_position_and_by_them_alone():
    count = 64
    logits_EV = jnp.broadcast_to(_logits(1), (count, VOCABULARY))
    nth_E = jnp.arange(count)
    by_seed = sample(logits_EV, _rows(nth_E), jnp.full(count, 5))[0]
    by_position = sample(logits_EV, _rows(jnp.full(count, 5)), nth_E)[0]
    assert len(np.unique(by_seed)) > 10 and len(np.unique(by_position)) > 10
    assert not np.array_equal(by_seed, by_position)  # the two are not added up
    for index in (0, 17, 2):
        alone = _rows([index])
        np.testing.assert_array_equal(sample(logits_EV[:1], alone, jnp.array([5]))[0], by_seed[index : index + 1])
    largest = jnp.array([2**32 - 1, 2**31, 0], jnp.uint32)
    tokens = sample(logits_EV[:3], _rows(largest), jnp.full(3, 5))[0]
    np.testing.assert_array_equal(tokens[2:], by_seed[:1])
    np.testing.assert_array_equal(sample(logits_EV[:3], _rows(largest[::-1]), jnp.full(3, 5))[0], tokens[::-1])


def test_a_draw_is_the_same_beside_rows_that_cut_that_are_greedy_or_that_may_not_cut():
    logits_EV, position_E = _logits(6), jnp.arange(6)
    plain = _rows([3, 1, 4, 1, 5, 9])
    want, log_probability_E, _ = sample(logits_EV, plain, position_E)
    mixed = plain.replace(  # type: ignore[attr-defined]
        temperature_E=jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]), top_k_E=jnp.array([0, 3, 0, 0, 0, 0], jnp.int32)
    )
    got = sample(logits_EV, mixed, position_E).token_E
    np.testing.assert_array_equal(got[np.array([0, 3, 4, 5])], want[np.array([0, 3, 4, 5])])
    assert got[2] == jnp.argmax(logits_EV[2])
    for greedy in (plain, mixed.replace(top_k_E=plain.top_k_E)):  # type: ignore[attr-defined]
        branched = sample(logits_EV, greedy, position_E)
        for one, other in zip(branched[:2], sample(logits_EV, greedy, position_E, cuts=False)[:2], strict=True):
            np.testing.assert_array_equal(one, other)
    picked_E = jnp.take_along_axis(jax.nn.log_softmax(logits_EV), want[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(log_probability_E, picked_E, atol=1e-6)


def test_draws_follow_the_softmax_of_what_is_left():
    count, temperature = 20_000, 0.7
    logits_V = _logits(1)[0]
    logits_EV, zeros = jnp.broadcast_to(logits_V, (count, VOCABULARY)), jnp.zeros(count, jnp.int32)
    order = np.argsort(-np.asarray(logits_V))
    weights = np.exp(np.asarray(logits_V, np.float64) / temperature)
    share = weights / weights.sum()
    before = np.cumsum(share[order]) - share[order]
    kept = {(0, 1.0): VOCABULARY, (5, 1.0): 5, (0, 0.5): int((before < 0.5).sum())}
    for (top_k, top_p), left in kept.items():
        tokens = sample(logits_EV, _rows(np.arange(count), temperature, top_k, top_p), zeros).token_E
        found = np.bincount(tokens, minlength=VOCABULARY) / count
        want = np.zeros(VOCABULARY)
        want[order[:left]] = share[order[:left]] / share[order[:left]].sum()
        assert found[want == 0].sum() == 0
        np.testing.assert_allclose(found, want, atol=5 * 0.5 / count**0.5)


def test_ids_beyond_the_tokenizer_are_never_chosen():
    logits_EV, position_E = _logits(300).at[:, 30:].add(20.0), jnp.arange(300)
    for rows, cuts in (
        (_rows(np.arange(300), temperature=0.0), True),
        (_rows(np.arange(300)), True),
        (_rows(np.arange(300)), False),
        (_rows(np.arange(300), top_k=35), True),
        (_rows(np.arange(300), top_p=0.9), True),
    ):
        token_E, log_probability_E, _ = sample(logits_EV, rows, position_E, known_tokens=30, cuts=cuts)
        assert int(token_E.max()) < 30
        alone_E = sample(logits_EV[:, :30], rows, position_E, cuts=cuts).token_E
        if not rows.draws_E.any():
            np.testing.assert_array_equal(token_E, alone_E)
        picked_E = jnp.take_along_axis(jax.nn.log_softmax(logits_EV), token_E[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(log_probability_E, picked_E, atol=1e-5)  # the model's own, over all ids

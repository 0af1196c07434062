"""Pages: taken as entries come, and as many bytes as the paper's table says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_examples import make_params, model_config, tokens

from mor_jax.config import ModelConfig, PerfConfig, RecursionConfig, RoutingConfig
from mor_jax.evaluate.calibrate import calibrate
from mor_jax.infer import cache as cache_module
from mor_jax.infer.cache import CacheShape, append, init_cache, kv_layout, kv_usage, reserve
from mor_jax.infer.decode_model import decoding_refusal, prepare_weights
from mor_jax.infer.prefill import prefill
from mor_jax.model.parameters import Weights


def test_reserving_takes_pages_only_where_the_last_is_full():
    config = model_config("none", "none")
    pool = init_cache(config, CacheShape(sequences=3, max_length=12, page_size=4)).block
    rows, group = jnp.array([2, 0]), jnp.zeros(2, jnp.int32)
    pool, start = reserve(pool, rows, group, jnp.array([5, 0]), 5)
    assert start.tolist() == [0, 0] and pool.length_SG[:, 0].tolist() == [0, 0, 5]
    assert pool.num_free == 9 - 2 and pool.table_SGM[2, 0, :2].tolist() == [8, 7]
    pool, start = reserve(pool, rows, group, jnp.array([3, 1]), 5)
    assert start.tolist() == [5, 0] and pool.num_free == 9 - 3 and pool.table_SGM[0, 0, 0] == 6
    pool, _ = reserve(pool, rows, group, jnp.array([1, 4]), 5)
    assert pool.length_SG[:, 0].tolist() == [5, 0, 9] and pool.num_free == 9 - 5


@pytest.mark.parametrize(("starts", "counts"), [((7, 4, 0), (1, 0, 1)), ((3, 6, 8), (6, 0, 2)), ((0, 1, 5), (4, 6, 3))])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_entries_come_behind_those_that_rows_hold(platform, starts, counts, monkeypatch):
    """Entry by entry in a plain loop: groups that begin or end in the middle of a page, and rows that add nothing."""
    asked: list[str] = []
    monkeypatch.setattr(cache_module, "target_platform", lambda: asked.append(platform) or platform)
    rng, size, heads, width = np.random.default_rng(0), 4, 2, 3
    pools = rng.normal(size=(2, 13, size, heads, width)).astype(np.float32)
    fresh = rng.normal(size=(2, 3, max(counts), heads, width)).astype(np.float32)
    table = rng.permutation(12).reshape(3, 4)
    sizes = (jnp.array(table), jnp.array(starts), jnp.array(counts))
    ours = jax.jit(lambda *arguments: append(*arguments))  # of its own: jax knows `append`'s trace for other platforms
    found = ours(tuple(jnp.asarray(pools.reshape(2, 13, -1))), tuple(jnp.asarray(fresh)), *sizes)
    assert asked
    for row in range(3):
        for nth in range(counts[row]):
            page, entry = divmod(starts[row] + nth, size)
            pools[:, table[row, page], entry] = fresh[:, row, nth]
    assert np.array_equal(np.stack(found), pools.reshape(2, 13, -1))


def _read(model, text, page_size):
    rows, length = text.shape
    cache = init_cache(model.config, CacheShape(rows, length, page_size))
    whole = jnp.arange(rows)
    sizes = (jnp.zeros_like(whole), jnp.full_like(whole, length), jnp.full_like(whole, 9))
    return prefill(model, cache, whole, jnp.asarray(text), *sizes)


@pytest.mark.parametrize(
    ("recursions", "kv"),
    [
        (3, "recursion"),
        (2, "shared"),
        *(pytest.param(r, kv, marks=pytest.mark.slow) for r, kv in ((2, "recursion"), (4, "recursion"), (3, "shared"))),
    ],
)
def test_bytes_follow_the_tokens_that_came_that_deep(recursions, kv):
    size, rows = 4, 5
    recursion = RecursionConfig(recursions, "middle_cycle", kv_strategy=kv)
    routing = RoutingConfig("expert")
    config = ModelConfig(31, 2 + recursions, 8, 2, 1, 4, 8, 64, dtype="float32", init_std=0.3, recursion=recursion,
                         routing=routing)  # fmt: skip
    text = tokens(rows, 51)
    whole = {"tokens": text, "segment_ids": np.ones_like(text), "positions": np.tile(np.arange(51), (rows, 1))}
    boundaries = calibrate(Weights(config, make_params(config)), PerfConfig(), [whole])
    text = text[:, :-1]  # calibration takes the last token for a target
    cache, output = _read(prepare_weights(config, make_params(config), boundaries=boundaries), text, size)
    usage, depth_BT = kv_usage(cache), np.asarray(output.depth_BT)
    shares = [float((depth_BT > r).mean()) for r in range(recursions)]
    np.testing.assert_allclose(shares, config.capacities, atol=0.05)
    layer = 2 * config.num_kv_heads * config.head_dim * 4
    vanilla = layer * config.num_layers * text.size
    block = sum(shares) if kv == "recursion" else 1.0
    expected = (2 + config.block_depth * block) / config.num_layers
    assert usage.used / vanilla == pytest.approx(expected, rel=1e-6)
    # within one page per sequence and group
    slack = rows * size * layer * (2 + config.block_depth * kv_layout(config).groups)
    assert usage.used <= usage.allocated <= usage.used + slack


def test_what_cannot_decode_is_refused_with_a_reason():
    update = model_config("expert", "cycle", "shared_update")
    assert "shared_update" in (decoding_refusal(update) or "")
    assert decoding_refusal(model_config("expert", "cycle")) is None
    untrained = ModelConfig(recursion=RecursionConfig(2, "cycle"), routing=RoutingConfig("expert", sampling="none"))
    assert "trains no causal boundary" in (decoding_refusal(untrained) or "")
    assert decoding_refusal(untrained, jnp.zeros(2)) is None


def test_decoding_compares_with_the_running_boundaries_unless_others_are_given():
    config = model_config("expert", "cycle")
    running_R = jnp.array([-jnp.inf, 0.25, jnp.nan])
    prepared = prepare_weights(config, make_params(config), running_R=running_R)
    np.testing.assert_array_equal(prepared.boundary_R, [-np.inf, 0.25, 0.0])
    given = prepare_weights(config, make_params(config), running_R=running_R, boundaries=(0.0, 0.5, 0.75))
    np.testing.assert_array_equal(given.boundary_R, [-np.inf, 0.5, 0.75])

"""Prefill and decoding give the logits of the full causal forward pass, token by token."""

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_examples import decode_model, full_forward, model_config, tokens

from mor_jax.config import PartsConfig
from mor_jax.infer import paged_attention as attention
from mor_jax.infer.cache import CacheShape, init_cache
from mor_jax.infer.prefill import prefill

PROMPTS = (13, 7, 1)
LENGTH, CHUNK = 19, 5


def _read(model, cache, tokens_BT, start_B, count_B, width, max_depth):
    """Read the next ``count_B`` tokens of three sequences in one call of a static width."""
    rows = np.zeros((3, width), np.int32)
    for row, (start, count) in enumerate(zip(start_B, count_B, strict=True)):
        rows[row, :count] = tokens_BT[row, start : start + count]
    # the cache has room for more sequences, and rows stand for any of them
    places = jnp.array([3, 0, 2], jnp.int32)
    sizes = (jnp.asarray(start_B, jnp.int32), jnp.asarray(count_B, jnp.int32), jnp.full(3, max_depth, jnp.int32))
    return prefill(model, cache, places, jnp.asarray(rows), *sizes, piece=3, return_logits=True)


def _decode_all(config, tokens_BT, max_depth=9):
    """Logits and depths of every token: prompts of mixed lengths in chunks, then one token at a time."""
    model = decode_model(config)
    cache = init_cache(config, CacheShape(sequences=4, max_length=LENGTH + 2, page_size=4))
    logits_BTV = np.zeros((3, LENGTH, config.vocab_size), np.float32)
    depth_BT = np.zeros((3, LENGTH), np.int32)
    read_B = np.zeros(3, np.int32)
    while (read_B < LENGTH).any():
        left_B = np.array(PROMPTS) - read_B
        width = CHUNK if (left_B > 0).any() else 1
        count_B = np.clip(left_B, 0, CHUNK) if width == CHUNK else np.minimum(LENGTH - read_B, 1)
        cache, output = _read(model, cache, tokens_BT, read_B, count_B, width, max_depth)
        for row, count in enumerate(count_B):
            span = slice(read_B[row], read_B[row] + count)
            logits_BTV[row, span] = output.logits_BTV[row, :count]
            depth_BT[row, span] = output.depth_BT[row, :count]
        read_B = read_B + count_B
    return logits_BTV, depth_BT, cache


def _check(config):
    tokens_BT = tokens(3, LENGTH)
    expected_BTV, expected_depth_BT = full_forward(config)(tokens_BT)
    logits_BTV, depth_BT, cache = _decode_all(config, tokens_BT)
    np.testing.assert_array_equal(depth_BT, expected_depth_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4, rtol=0)
    if config.routing.kind != "none":
        assert len(np.unique(depth_BT)) >= 3  # tokens really go to different depths
    _check_lengths(config, depth_BT, cache)


def _check_lengths(config, depth_BT, cache):
    """Caches hold exactly the tokens that came there, in pages taken for them alone."""
    places, size = [3, 0, 2], cache.block.page_size
    groups = cache.block.length_SG.shape[1]
    reached_BG = np.stack([(depth_BT > r).sum(1) for r in range(groups)], axis=1)
    if config.recursion.kv_strategy == "shared" or config.recursion.is_sequence or config.routing.kind == "none":
        reached_BG = np.full_like(reached_BG, LENGTH)
    np.testing.assert_array_equal(cache.block.length_SG[np.array(places)], reached_BG)
    pages = -(-reached_BG // size)
    assert int(cache.block.free_P.shape[0] - cache.block.num_free) == pages.sum()
    held = [cache.block.table_SGM[s, g, : pages[b, g]] for b, s in enumerate(places) for g in range(groups)]
    held = np.concatenate(held)
    assert len(np.unique(held)) == len(held)


@pytest.mark.parametrize(
    ("routing", "sharing", "kv"),
    [
        ("expert", "middle_cycle", "recursion"),
        ("expert-aux", "cycle", "shared"),
        ("token", "cycle", "recursion"),
        ("token-bias", "middle_cycle", "shared"),
        ("none", "middle_sequence", "shared"),
        ("none", "none", "recursion"),
    ],
)
def test_decoding_is_the_causal_forward_pass(routing, sharing, kv):
    _check(model_config(routing, sharing, kv))


@pytest.mark.parametrize(
    ("routing", "sharing", "kv"),
    [
        ("expert", "middle_cycle", "recursion"),
        ("token", "cycle", "recursion"),
        pytest.param("expert-aux", "cycle", "shared", marks=pytest.mark.slow),
        pytest.param("token-bias", "middle_cycle", "shared", marks=pytest.mark.slow),
    ],
)
def test_a_cap_on_the_passes_means_the_same_to_evaluation_and_decoding(routing, sharing, kv):
    """Same depths and logits, so the same tokens; for token-choice another model than one whose depths are clamped."""
    config, tokens_BT = model_config(routing, sharing, kv), tokens(3, LENGTH)
    _, free_BT = full_forward(config)(tokens_BT)
    for cap in (1, 2):
        expected_BTV, expected_BT = full_forward(config, cap)(tokens_BT)
        logits_BTV, depth_BT, _ = _decode_all(config, tokens_BT, cap)
        np.testing.assert_array_equal(depth_BT, expected_BT)
        np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(logits_BTV.argmax(-1), np.asarray(expected_BTV).argmax(-1))
        assert depth_BT.max() == cap
    if config.routing.kind == "token":
        assert np.any(depth_BT != np.minimum(free_BT, 2)), "a token's best depth of two is not always the deeper one"


@pytest.mark.parametrize(
    ("routing", "kv"), [("expert", "recursion"), pytest.param("expert-aux", "shared", marks=pytest.mark.slow)]
)
def test_what_attends_block_by_block_gives_the_same(routing, kv, monkeypatch):
    seen, by_blocks = [], attention.attend_by_blocks
    # 6 pages of 4 entries, 4 at a time: the last block begins inside the one before; of single tokens 2
    monkeypatch.setattr(attention, "PROMPT_BLOCK", 16)
    monkeypatch.setattr(attention, "TOKEN_BLOCK", 8)
    monkeypatch.setattr(attention, "attend_by_blocks", lambda *args: seen.append(args[-1]) or by_blocks(*args))
    anew = jax.jit(inspect.unwrap(prefill), static_argnames=("piece", "return_logits"))
    monkeypatch.setattr(sys.modules[__name__], "prefill", anew)
    _check(model_config(routing, "cycle", kv, num_layers=3))
    assert set(seen) == {4, 2}


def _chunk_and_pages(dtype="float32", head_dim=8):
    """Five queries of three rows, 6 heads on 2, over 7 pages of 4 entries."""
    rng, size, pages = np.random.default_rng(0), 4, 7
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    table_BM = jnp.asarray(rng.permutation(3 * pages).reshape(3, pages), jnp.int32)
    pool = (3 * pages, size * 2 * head_dim)
    # the second row ends in the first block, the third is full; two queries see nothing
    visible_BT = jnp.array([[0, 1, 7, 8, 9], [3, 4, 5, 6, 7], [28, 27, 26, 25, 0]])
    return (draw(3, 5, 6, head_dim), (draw(*pool), draw(*pool)), table_BM, visible_BT), size


def _check_kernel(dtype, tolerance, *, interpret):
    (query_BTNH, cached, table_BM, visible_BT), page_size = _chunk_and_pages(dtype, head_dim=16)
    query32_BTNH, cached32 = jax.tree.map(lambda x: x.astype(jnp.float32), (query_BTNH, cached))
    with jax.default_matmul_precision("highest"):
        want = attention.attend_by_blocks(query32_BTNH, cached32, table_BM, visible_BT, page_size, 3)
    got = attention.attend_by_kernel(query_BTNH, cached, table_BM, visible_BT, page_size, interpret=interpret)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_chunk_attends_by_the_kernel_as_block_by_block(dtype, tolerance):
    _check_kernel(dtype, tolerance, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_a_chunk_attends_by_the_compiled_kernel_too():
    _check_kernel("bfloat16", 2e-2, interpret=False)


def test_blocks_of_pages_add_up_to_plain_attention():
    arguments, size = _chunk_and_pages()
    visible_BT = arguments[-1]
    want = attention._gather_and_attend(*arguments, page_size=size)
    seen = np.asarray(visible_BT) > 0
    for step in (1, 3):
        got = jax.jit(attention.attend_by_blocks, static_argnums=(4, 5))(*arguments, size, step)
        np.testing.assert_allclose(got[seen], want[seen], atol=1e-5, rtol=0)
        assert not np.any(got[~seen])


PARTS = PartsConfig(qk_norm=True)
VANILLA_PARTS = PartsConfig(qk_norm=True, value_residual=True)


@pytest.mark.parametrize(
    ("routing", "sharing", "kv", "parts"),
    [
        ("expert", "middle_cycle", "recursion", PARTS),
        pytest.param("expert-aux", "cycle", "shared", PARTS, marks=pytest.mark.slow),
        pytest.param("token", "cycle", "shared", PARTS, marks=pytest.mark.slow),
        pytest.param("none", "middle_cycle", "recursion", PARTS, marks=pytest.mark.slow),
        pytest.param("none", "middle_sequence", "shared", PARTS, marks=pytest.mark.slow),
        ("none", "none", "recursion", VANILLA_PARTS),
    ],
)
def test_parts_decode_exactly(routing, sharing, kv, parts):
    layers = {} if sharing == "none" else {"num_layers": 5 if "middle" in sharing else 3}
    _check(model_config(routing, sharing, kv, parts=parts, **layers))


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["recursion", "shared"])
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("routing", ["expert", "expert-aux", "token", "token-bias"])
def test_every_router_decodes_exactly(routing, sharing, kv):
    _check(model_config(routing, sharing, kv))


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["recursion", "shared"])
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "sequence", "middle_sequence"])
def test_every_recursive_sharing_decodes_exactly(sharing, kv):
    _check(model_config("none", sharing, kv))


@pytest.mark.slow
@pytest.mark.parametrize(("routing", "sharing"), [("expert", "middle_cycle"), ("none", "sequence"), ("token", "cycle")])
def test_unshared_norms_and_an_untied_head_decode_exactly(routing, sharing):
    _check(model_config(routing, sharing, share_norms=False, tie_embeddings=False))

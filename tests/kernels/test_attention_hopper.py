"""The Mosaic GPU attention kernels against softmax in float32, values and gradients.

They run in Pallas' interpreter where it can run them, and compiled on a Hopper GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter

from mor_jax.errors import UserError
from mor_jax.kernels.attention import hopper as attention_hopper
from mor_jax.kernels.attention import hopper_walk as attention_hopper_walk
from mor_jax.kernels.attention.hopper import Tiling, flash_attention
from mor_jax.kernels.attention.hopper_place import (
    Shape,
    Tiles,
    key_items,
    place_keys,
    place_queries,
    plan_keys,
    plan_queries,
    query_items,
)
from mor_jax.kernels.attention.mask import Mask, TokenView

ROUNDING = 5e-3
"""Relative norm of what rounding probabilities and gradients to bfloat16 for the products may cost."""


def _softmax(query_BTNH, key_BSKH, value_BSKH, mask_BTS):
    """Attention written out in float32; zero for queries that see nothing."""
    groups = query_BTNH.shape[2] // key_BSKH.shape[2]
    key_BSNH, value_BSNH = (jnp.repeat(x, groups, axis=2) for x in (key_BSKH, value_BSKH))
    with jax.default_matmul_precision("highest"):
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BSNH) * query_BTNH.shape[-1] ** -0.5
        share_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -1e30), axis=-1)
        share_BNTS = jnp.where(mask_BTS[:, None], share_BNTS, 0.0)
        return jnp.einsum("BNTS,BSNH->BTNH", share_BNTS, value_BSNH)


def _check(shape, start=None, end=None, tolerance=ROUNDING, **options):
    """Compare output and the three gradients; shape: rows, queries, keys, heads, key/value heads, head_dim."""
    rows, queries, keys, heads, kv_heads, head_dim = shape
    seeds = jax.random.split(jax.random.key(0), 4)
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    *inputs, grad = (
        jax.random.normal(seed, (rows, length, count, head_dim), "bfloat16")
        for seed, (length, count) in zip(seeds, sizes, strict=True)
    )
    last_BT = jnp.broadcast_to(jnp.arange(queries)[None] + 1, (rows, queries)) if end is None else end
    key = jnp.arange(keys)[None, None, :]
    mask_BTS = (key < last_BT[:, :, None]) & (key >= (0 if start is None else start[:, :, None]))

    def plain(query, key, value):
        return _softmax(query, key, value, mask_BTS)

    def fused(query, key, value):
        return flash_attention(query, key, value, start, end, interpret=gpu_interpreter(), **options)

    results = []
    for function, kind in ((plain, "float32"), (fused, "bfloat16")):
        out, pull = jax.vjp(jax.jit(function), *(x.astype(kind) for x in inputs))
        results.append([x.astype(jnp.float32) for x in (out, *pull(grad.astype(kind)))])
    for want, got in zip(*results, strict=True):
        assert want.shape == got.shape
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < tolerance
    return results[1]


def _selected(rows, queries, keys):
    order = jnp.argsort(jax.random.uniform(jax.random.key(1), (rows, keys)), axis=1)[:, :queries]
    return jnp.sort(order, axis=1).astype(jnp.int32) + 1


def _documents(rows, length, mean):
    ends = jax.random.bernoulli(jax.random.key(2), 1 / mean, (rows, length))
    return _runs(jnp.cumsum(ends, axis=1).astype(jnp.int32))


def _runs(segments_BT):
    rows_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    return Mask(TokenView(rows_BT, rows_BT, segments_BT)).runs()


def test_causal_with_grouped_heads_and_a_length_that_no_tile_divides():
    _check((1, 203, 203, 3, 1, 64))


def test_causal_head_dim_128_with_as_many_key_heads():
    _check((1, 136, 136, 2, 2, 128))


def test_selected_queries_over_all_keys():
    _check((1, 72, 200, 3, 1, 64), end=_selected(1, 72, 200))


def test_packed_documents():
    start, end = _documents(1, 200, 60)
    _check((1, 200, 200, 2, 1, 64), start, end)


def _plan(*runs, keys, block_rows=64):
    tiles = Tiles(block_rows=block_rows, warpgroups=2, stages=2, persistent=False)
    return np.asarray(plan_keys(runs, tiles, keys))


def test_blocks_of_selected_queries_that_see_a_whole_tile_of_keys():
    """One of them has a query without keys, and the last one ends beyond the array."""
    end = _selected(1, 168, 256).at[0, 100].set(0)
    assert _plan(end, keys=256).tolist() == [[[0, 1, 3, 3], [0, 2, 3, 3], [1, 2, 3, 3], [1, 3, 3, 3]]]
    _check((1, 168, 256, 3, 1, 64), end=end)


def test_blocks_of_packed_queries_that_see_a_whole_tile_of_keys():
    """Between the blocks where queries and keys meet, and the block where the document ends."""
    start, end = _runs((jnp.arange(328)[None] >= 250).astype(jnp.int32))
    want = [[0, 1, 3, 4], [1, 2, 3, 4], [2, 2, 2, 4], [3, 3, 3, 6], [4, 5, 6, 6], [5, 5, 5, 6]]
    assert _plan(start, end, keys=328).tolist() == [want]
    _check((1, 328, 328, 2, 1, 64), start, end)


def test_runs_in_any_order():
    """Runs at random, some of them empty; two blocks of queries see tiles that others do not see whole."""
    start, end = jax.random.randint(jax.random.key(3), (2, 1, 264), 0, 264)
    start = start.at[:, 64:128].set(0).at[:, 192:].set(0)
    end = end.at[:, 64:128].set(200).at[:, 192:].set(130)
    plan = _plan(start, end, keys=264)
    assert plan[0, 0].tolist() == [0, 3, 5, 5] and plan[0, 2].tolist() == [0, 1, 2, 5]
    _check((1, 264, 264, 2, 1, 64), start, end)


def test_tiles_of_one_thread_block_with_different_walks(monkeypatch):
    """As many key heads as query heads: the warpgroups of a thread block have tiles of queries one behind the other.

    Two items of queries for one thread block, which takes them in turn.
    """
    monkeypatch.setattr(attention_hopper_walk, "programs", lambda tiles, items: 1 if tiles.persistent else items)
    monkeypatch.setattr(attention_hopper, "programs", attention_hopper_walk.programs)
    _check(
        (1, 264, 264, 1, 1, 64), tiling=Tiling(*(Tiles(block_rows=64, warpgroups=3, stages=2, persistent=True),) * 3)
    )


@pytest.mark.parametrize("length", [128, 200])
def test_a_warpgroup_without_a_tile_writes_nothing(length):
    """Two or four tiles for the three warpgroups of items, and another head behind."""
    _check((1, length, length, 2, 2, 64))


@pytest.mark.parametrize("head_dim", attention_hopper.TILINGS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("length", [64, 136, 256, 1368])
def test_the_causal_walks_of_all_warpgroups_lie_within_their_thread_block_s(length, groups, head_dim):
    """Also those of warpgroups without a tile: a step too many would wait for a block that nobody copies."""
    tiling, shape = attention_hopper.TILINGS[head_dim], Shape(1, length, length, groups, 1, head_dim, 0)
    for tiles, items, place in (
        (tiling.forward, query_items, place_queries),
        (tiling.grad_queries, query_items, place_queries),
        (tiling.grad_keys, key_items, place_keys),
    ):
        item, wg = jnp.meshgrid(jnp.arange(items(shape, tiles)), jnp.arange(tiles.warpgroups))

        def bounds(item, wg, tiles=tiles, place=place):
            here = place(shape, tiles, None, item, wg)
            span = here.span
            return jnp.stack([here.begin, span.first, span.whole, span.rest, span.last, here.stop])

        found = jax.vmap(bounds)(item.ravel(), wg.ravel())
        assert (jnp.diff(found, axis=1) >= 0).all() and (found <= -(-length // tiles.block_rows)).all()


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "head_dim", "dtype", "message"),
    [(8, 8, 2, 64, "float16", "dtype=float16"), (8, 8, 2, 96, "bfloat16", "head_dim=96"),
     (8, 8, 3, 64, "bfloat16", "3 heads"), (8, 16, 2, 64, "bfloat16", "8 causal queries, but 16 keys")],
)  # fmt: skip
def test_arrays_that_the_kernels_do_not_take_are_refused(queries, keys, heads, head_dim, dtype, message):
    query, key = jnp.zeros((1, queries, heads, head_dim), dtype), jnp.zeros((1, keys, 2, head_dim), dtype)
    with pytest.raises(UserError, match=message):
        flash_attention(query, key, key)


def test_a_query_without_keys_returns_zero_and_gets_no_gradient():
    end = _selected(1, 72, 136).at[0, 3].set(0)
    out, grad_query, *_ = _check((1, 72, 136, 1, 1, 64), end=end)
    assert float(jnp.max(jnp.abs(out[:, 3]))) == 0 and float(jnp.max(jnp.abs(grad_query[:, 3]))) == 0


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["causal", "selected", "shared", "packed", "wide", "alone", "pairs"])
def test_compiled_kernels_at_the_size_of_training(kind):
    """Rows of the 360M model; head_dim 128; as many key heads, and half as many, whose last items have no tile for some
    warpgroup, which must not write over the next head's sums."""
    tokens, selected = 2048, 1368
    start = end = None
    shape = (2, tokens, tokens, 15, 5, 64)
    if kind == "selected":
        shape = (2, selected, selected, 15, 5, 64)
    if kind == "shared":
        shape, end = (2, selected, tokens, 15, 5, 64), _selected(2, selected, tokens)
    if kind == "packed":
        start, end = _documents(2, tokens, 300)
    if kind in ("alone", "pairs"):
        shape = (2, selected, selected, 4, 4 if kind == "alone" else 2, 64)
    if kind == "wide":
        shape = (2, tokens, tokens, 4, 4, 128)
    _check(shape, start, end, tolerance=3.5e-3)


def test_the_plan_of_queries_by_hand():
    """Three tiles of 64 queries; two documents, of 100 and 60 tokens; blocks of 32 keys."""
    rows_BT = jnp.arange(160, dtype=jnp.int32)[None]
    start_BT = jnp.where(rows_BT < 100, 0, 100)
    tiles = Tiles(block_rows=32, warpgroups=3, stages=2, persistent=True)
    causal = plan_queries((rows_BT + 1,), tiles)
    assert causal.tolist() == [[[0, 0, 0, 2], [0, 0, 2, 4], [0, 0, 0, 5]]]  # the last tile has queries without keys
    packed = plan_queries((start_BT, rows_BT + 1), tiles)
    assert packed.tolist() == [[[0, 0, 0, 2], [0, 4, 4, 4], [3, 5, 5, 5]]]


def test_the_plan_of_keys_by_hand():
    """Tiles of 64 keys, and the blocks of 32 queries that need them; queries that do not exist need none."""
    rows_BT = jnp.arange(152, dtype=jnp.int32)[None]
    start_BT = jnp.where(rows_BT < 100, 0, 100)
    tiles = Tiles(block_rows=32, warpgroups=2, stages=2, persistent=False)
    assert plan_keys((rows_BT + 1,), tiles, 152).tolist() == [[[0, 2, 5, 5], [2, 4, 5, 5], [4, 5, 5, 5]]]
    assert plan_keys((start_BT, rows_BT + 1), tiles, 152).tolist() == [[[0, 2, 3, 4], [2, 2, 2, 5], [4, 4, 4, 5]]]
    nobody = plan_keys((jnp.zeros_like(rows_BT),), tiles, 152)
    np.testing.assert_array_equal(nobody[:, :, 0], nobody[:, :, 3])


def _random_runs(kind, rows, queries, keys):
    """(start, end) with every row its own."""
    start = np.zeros((rows, queries), np.int32)
    if kind == "selected":
        return start, np.array(_selected(rows, queries, keys))
    if kind == "packed":
        start, end = _documents(rows, queries, 60)
        return np.array(start), np.array(end)
    random = np.random.default_rng(0)
    end = random.integers(-8, keys + 1, (rows, 1)) + random.integers(-40, 40, (rows, queries))
    if kind == "any runs":
        start = (end - random.integers(-8, keys, (rows, queries))).astype(np.int32)
    end = np.where(random.random((rows, queries)) < 0.05, 0, end)
    for block in range(0, queries, 32):  # blocks that see a lot, in no order
        often = random.random(rows) < 0.5
        end[often, block : block + 32] = keys - 3
        start[often, block : block + 32] = 0
    return start, np.clip(end, -8, keys).astype(np.int32)


@pytest.mark.parametrize("block_rows", [32, 64])
@pytest.mark.parametrize("kind", ["selected", "packed", "one run", "any runs"])
def test_the_plan_of_keys_against_what_is_visible(kind, block_rows):
    """No block beyond the span sees the tile, and no block that goes without a mask needs one; runs that ascend have
    no other blocks with a mask."""
    rows, queries = 40, 232
    keys = queries if kind == "packed" else 300
    start, end = _random_runs(kind, rows, queries, keys)
    runs = (start, end) if kind in ("packed", "any runs") else (end,)
    plan = _plan(*(jnp.asarray(x) for x in runs), keys=keys, block_rows=block_rows)
    key = np.arange(-(-keys // 64) * 64)
    visible = (key >= start[:, :, None]) & (key < end[:, :, None])
    visible = np.pad(visible, ((0, 0), (0, -queries % block_rows), (0, 0)))
    visible = visible.reshape(rows, -1, block_rows, len(key) // 64, 64)
    alone = ~visible.any(axis=(3, 4), keepdims=True)  # queries without keys
    index = np.arange(visible.shape[1])
    first, whole, rest, last = (plan[:, :, i, None] for i in range(4))
    needed, clear = np.any(visible, axis=(2, 4)), np.all(visible | alone, axis=(2, 4))
    needed, clear = np.swapaxes(needed, 1, 2), np.swapaxes(clear, 1, 2)
    plain = (index >= whole) & (index < rest)
    assert (first <= whole).all() and (whole <= rest).all() and (rest <= last).all()
    assert ((index >= first) & (index < last))[needed].all()
    assert clear[plain].all() and plain.any()
    if kind in ("selected", "packed"):
        np.testing.assert_array_equal(plain, needed & clear)
    if len(runs) == 1:
        np.testing.assert_array_equal(rest, last)

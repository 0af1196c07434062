"""The Triton attention kernels against plain attention, values and gradients: in the interpreter, on a GPU compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.kernels.attention import triton as attention_gpu
from mor_jax.kernels.attention.triton import flash_attention
from mor_jax.kernels.attention.triton_kernels import Blocks, Tiling

SMALL = Tiling(Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2))
QUERIES, KEYS = 41, 70


def _inputs(queries: int) -> tuple[jax.Array, ...]:
    q, k, v, grad, order = jax.random.split(jax.random.key(0), 5)
    rows = jnp.argsort(jax.random.uniform(order, (2, KEYS)), axis=1)[:, :queries]
    return (
        jax.random.normal(q, (2, queries, 4, 16)),
        jax.random.normal(k, (2, KEYS, 2, 16)),
        jax.random.normal(v, (2, KEYS, 2, 16)),
        jax.random.normal(grad, (2, queries, 4, 16)),
        jnp.sort(rows, axis=1).astype(jnp.int32),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_selected_queries_over_all_keys(packed: bool):
    query, key, value, grad_out, rows_BT = _inputs(QUERIES)
    start = rows_BT // 30 * 30 if packed else None
    end = rows_BT + 1

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        keys = jnp.arange(KEYS)[None, None, :]
        mask_BTS = keys < end[:, :, None]
        if start is not None:
            mask_BTS &= keys >= start[:, :, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask_BTS[:, None], implementation="xla")

    def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return flash_attention(query, key, value, start, end, tiling=SMALL, interpret=True)

    results = []
    for function in (plain, fused):
        out, pull = jax.vjp(jax.jit(function), query, key, value)
        results.append([out, *pull(grad_out)])
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_blocks_of_keys_skip_documents_that_follow():
    """Three documents of 32 rows: also the last block of the 73 queries, which is not whole, is for its own alone."""
    row_BT = jnp.arange(73, dtype=jnp.int32)[None]
    blocks_BJ2 = attention_gpu._query_blocks(row_BT // 32 * 32, row_BT + 1, Blocks(16, 32, 4, 2), 96)
    assert blocks_BJ2.tolist() == [[[0, 2], [2, 4], [4, 5]]]


def _masked_softmax(query_BTNH, key_BSKH, value_BSKH, end_BT):
    """Attention to the keys before ``end``, written out in float32."""
    groups = query_BTNH.shape[2] // key_BSKH.shape[2]
    key_BSNH, value_BSNH = (jnp.repeat(x, groups, axis=2) for x in (key_BSKH, value_BSKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BSNH) * query_BTNH.shape[-1] ** -0.5
    visible_BTS = jnp.arange(key_BSKH.shape[1])[None, None, :] < end_BT[:, :, None]
    share_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", share_BNTS, value_BSNH)


def _check_shared_keys(queries: int, keys: int, heads: int, head_dim: int, dtype: str, tolerance: float, **options):
    """Relative norm of the difference to float32 attention on the same inputs: output and all three gradients."""
    *seeds, order = jax.random.split(jax.random.key(0), 5)
    lengths, counts = (queries, keys, keys, queries), (heads, heads // 3, heads // 3, heads)
    shapes = [(2, length, count, head_dim) for length, count in zip(lengths, counts, strict=True)]
    *inputs, grad = (jax.random.normal(seed, shape, dtype) for seed, shape in zip(seeds, shapes, strict=True))
    rows_BT = jnp.sort(jnp.argsort(jax.random.uniform(order, (2, keys)), axis=1)[:, :queries], axis=1)
    end_BT = rows_BT.astype(jnp.int32) + 1

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _masked_softmax(query, key, value, end_BT)

    def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return flash_attention(query, key, value, None, end_BT, **options)

    results = []
    for function, kind in ((plain, "float32"), (fused, dtype)):
        out, pull = jax.vjp(jax.jit(function), *(x.astype(kind) for x in inputs))
        results.append([x.astype(jnp.float32) for x in (out, *pull(grad.astype(kind)))])
    for want, got in zip(*results, strict=True):
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < tolerance


def test_selected_queries_against_a_softmax_that_is_written_out():
    _check_shared_keys(QUERIES, KEYS, 6, 16, "float32", 1e-5, tiling=SMALL, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_compiled_kernels_for_shared_keys():
    """Selected queries of the 360M model over all keys, as its training with shared keys and values calls it."""
    _check_shared_keys(1368, 2048, 15, 64, "bfloat16", 3e-3)


def test_a_query_without_keys_returns_zero_and_gets_no_gradient():
    query, key, value, grad_out, rows_BT = _inputs(QUERIES)
    end = jnp.where(jnp.arange(QUERIES)[None, :] == 3, 0, rows_BT + 1)
    out, pull = jax.vjp(lambda q: flash_attention(q, key, value, None, end, tiling=SMALL, interpret=True), query)
    (grad_query,) = pull(grad_out)
    assert float(jnp.max(jnp.abs(out[:, 3]))) == 0 and float(jnp.max(jnp.abs(grad_query[:, 3]))) == 0
    assert float(jnp.max(jnp.abs(out[:, 4]))) > 0 and bool(jnp.all(jnp.isfinite(grad_query)))

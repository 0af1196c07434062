"""Keys and values in int8: every reader of pages reads them, and the engine gives what each request gets alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_examples import decode_model, full_forward, model_config
from engine_examples import LENGTH, OPTIONS, check_empty, make_requests, serve

from mor_jax import presets
from mor_jax.errors import UserError
from mor_jax.infer import paged_attention as attention
from mor_jax.infer.cache import CacheShape, entry_bytes, init_cache, kv_layout
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.prefill import prefill
from mor_jax.kernels.decode_attention import attend_to_pages
from mor_jax.kernels.int8_pages import Int8Pages, gather_pages, quantize

INT8 = dataclasses.replace(OPTIONS, kv_dtype="int8")


def _pools(dtype, head_dim=16, size=4, pages=21):
    """Keys and values in int8, and the same numbers in the compute dtype."""
    rng, every_1P = np.random.default_rng(0), jnp.arange(pages)[None, :]
    int8, plain = [], []
    for _ in range(2):
        entries = jnp.asarray(rng.normal(size=(pages, size, 2, head_dim)), dtype)
        numbers, scales = quantize(entries)
        int8.append(Int8Pages(numbers.reshape(pages, -1), scales.reshape(pages, -1)))
        plain.append(gather_pages(int8[-1], every_1P, size, head_dim, dtype).reshape(pages, -1))
    return tuple(int8), tuple(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reader", ["pages", "blocks", "kernel"])
def test_every_reader_sees_the_numbers_times_their_scales(reader, dtype):
    """Five queries of three rows, 6 heads on 2, over 7 pages of 4 entries."""
    read: Any = {
        "pages": attend_to_pages,
        "blocks": lambda query, cached, table, visible, size: attention.attend_by_blocks(
            query, cached, table, visible, size, 3
        ),
        "kernel": functools.partial(attention.attend_by_kernel, interpret=True),
    }[reader]
    int8, plain = _pools(dtype)
    rng = np.random.default_rng(1)
    query_BTNH = jnp.asarray(rng.normal(size=(3, 5, 6, 16)), dtype)
    table_BM = jnp.asarray(rng.permutation(21).reshape(3, 7), jnp.int32)
    visible_BT = jnp.array([[2, 1, 7, 8, 9], [3, 4, 5, 6, 7], [28, 27, 26, 25, 1]])
    got, want = (read(query_BTNH, cached, table_BM, visible_BT, 4) for cached in (int8, plain))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=1e-6, rtol=0)


def _check_alone(config, requests, results):
    """Each token is what a cache in int8 that holds one text says, read at once, and the full forward pass does not.

    Sums in another order may move a number across the middle between two of int8's, and what follows by as much as int8
    itself does; 3 in 100 are allowed to.
    """
    model, off, off_without = decode_model(config), [], []
    passes = [token.depth for result in results for token in result]
    empty = functools.partial(init_cache, config, CacheShape(1, LENGTH, OPTIONS.page_size, kv_dtype="int8"))
    one, zero = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)
    for request, result in zip(requests, results, strict=True):
        row, size = np.zeros((1, LENGTH), np.int32), len(request.prompt)
        whole = [*request.prompt, *(t.token for t in result)]
        row[0, : len(whole)] = whole
        _, output = prefill(model, empty(), zero, row, zero, one * len(whole), one * 9, return_logits=True)
        assert [t.depth for t in result] == output.depth_BT[0, size - 1 : len(whole) - 1].tolist()
        for logits_BTV, errors in ((output.logits_BTV, off), (full_forward(config)(row)[0], off_without)):
            says_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]), np.float64)[size - 1 :]
            errors += [says_V[t.token] - t.log_probability for says_V, t in zip(says_TV, result, strict=False)]
            if errors is off:
                assert [t.token for t in result] == says_TV[: len(result)].argmax(1).tolist()
    off, off_without = np.abs(off), np.abs(off_without)[np.array(passes) > 0]  # others may read no keys at all
    assert np.mean(off < 1e-4) > 0.97 and off.max() < 0.05
    assert np.median(off_without) > 1e-3


def test_the_engine_gives_every_request_what_int8_gives_it_alone():
    """With shared prefixes, few pages and lost places; alone in the engine as well."""
    config = model_config("expert", "middle_cycle", "recursion", num_layers=5)
    engine, requests = Engine(decode_model(config), INT8), make_requests(40)
    results = serve(engine, requests)
    assert engine.statistics.preemptions > 0 and engine.statistics.found_tokens > 0
    _check_alone(config, requests, results)
    for request, result in zip(requests[:5], results, strict=False):
        (alone,) = serve(engine, [request])
        assert [(t.token, t.depth) for t in alone] == [(t.token, t.depth) for t in result]
    check_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routing", "sharing", "kv"),
    [
        ("expert-aux", "cycle", "shared"),
        ("token", "cycle", "recursion"),
        ("none", "middle_sequence", "shared"),
        ("none", "none", "recursion"),
    ],
)
def test_every_kind_of_engine_does_so_in_int8(routing, sharing, kv):
    config = model_config(routing, sharing, kv)
    engine = Engine(decode_model(config), dataclasses.replace(INT8, block_pages=None, edge_pages=None))
    requests = make_requests(40)
    _check_alone(config, requests, serve(engine, requests))
    check_empty(engine)


@pytest.mark.parametrize("name", ["vanilla-360m", "mor-360m-expert-r3"])
@pytest.mark.parametrize(("kv_dtype", "of_head"), [("model", 128), ("int8", 66)])
def test_a_page_has_the_bytes_of_its_entries(name, kv_dtype, of_head):
    """5 heads of 64 numbers, keys and values: two bytes a number, or one and two for the scale."""
    config = presets.get(name).config.model
    cache = jax.eval_shape(lambda: init_cache(config, CacheShape(2, 64, 16, kv_dtype=kv_dtype)))
    assert entry_bytes(config, kv_dtype) == 2 * 5 * of_head
    sizes = [
        sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((p.keys, p.values))) for p in cache.pools
    ]
    layout = kv_layout(config)
    layers = [layout.block_layers, layout.edge_layers][: len(sizes)]
    assert [size // pool.free_P.shape[0] for size, pool in zip(sizes, cache.pools, strict=True)] == [
        16 * count * 2 * 5 * of_head for count in layers
    ]


def test_the_kernel_that_does_not_read_int8_and_other_dtypes_are_refused():
    config = model_config("none", "none")
    with pytest.raises(UserError, match=r"backend='pallas' needs .* kv_dtype='model', not 'int8'"):
        attention.decode_backend(config, "pallas", 1, "int8")
    with pytest.raises(UserError, match="kv_dtype='int4' is not one of 'model', 'int8'"):
        EngineOptions(kv_dtype="int4")  # type: ignore[arg-type]

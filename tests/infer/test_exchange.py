"""Pages change hands: shared ones stay until the last holder goes, and who will write gets a copy of a page in part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from decode_examples import model_config

from mor_jax.infer.cache import CacheShape, init_cache, reserve
from mor_jax.infer.exchange import Orders, _exchange

_hand_over = jax.jit(_exchange, static_argnames="places")


def _orders(drop=(), **source):
    drop_S, source_S = np.zeros(4, bool), np.full(4, -1, np.int32)
    drop_S[list(drop)] = True
    for row, number in source.items():
        source_S[int(row[1:])] = number
    return Orders(drop_S, source_S, ())


def _give(pool, orders, *lengths):
    return _hand_over(pool, jnp.asarray(lengths, jnp.int32)[:, None], orders, places=2)


def _pages(pool, row):
    return pool.table_SGM[row, 0, : -(-int(pool.length_SG[row, 0]) // 4)].tolist()


def _check(pool, *, free, extra):
    assert int(pool.num_free) == free
    held = {page for row in range(4) for page in _pages(pool, row)}
    assert sorted([*pool.free_P[:free].tolist(), *held]) == list(range(pool.free_P.shape[0]))
    assert {page: n for page, n in enumerate(pool.extra_P.tolist()) if n} == extra


def test_pages_are_shared_copied_and_given_back():
    """Two places, two rows of sequences that have ended, pages of four entries."""
    pool = init_cache(model_config("none", "none"), CacheShape(2, 12, 4, block_pages=6, kept=2)).block
    pool, _ = reserve(pool, jnp.array([0]), jnp.zeros(1, jnp.int32), jnp.array([10]), 10)
    numbers = jnp.arange(6.0)[:, None] * jnp.ones_like(pool.keys[0])
    pool = dataclasses.replace(pool, keys=(numbers, *pool.keys[1:]))
    first, second, third = _pages(pool, 0)
    pool = _give(pool, _orders(_1=0), 0, 6, 0, 0)
    shared, copy = _pages(pool, 1)
    assert shared == first and copy not in (first, second, third)
    assert (pool.keys[0][copy] == second).all()
    _check(pool, free=2, extra={first: 1})
    pool = _give(pool, _orders([0], _2=0), 0, 0, 10, 0)  # kept: nothing is copied
    assert _pages(pool, 0) == [] and _pages(pool, 2) == [first, second, third]
    _check(pool, free=2, extra={first: 1})
    pool = _give(pool, _orders([1, 2], _0=1, _3=2), 6, 0, 0, 7)  # both move on, and nobody else holds the third
    assert _pages(pool, 3) == [first, second] and _pages(pool, 0)[0] == first
    assert (pool.keys[0][_pages(pool, 0)[1]] == second).all()
    _check(pool, free=3, extra={first: 1})
    pool = _give(pool, _orders([0, 3]), 0, 0, 0, 0)
    _check(pool, free=6, extra={})

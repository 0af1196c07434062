"""What changes hands between two dispatches: pages given back, kept under another row, and taken over by a new prompt.

Rows of the page tables are those of places, then those of sequences that have ended. Several rows may hold a page. Only
a place writes, and only behind the entries that it had: a place that takes over entries gets a copy of the last page of
each group if that is not full, and shares the others. Rows of sequences that have ended share even that one: the place
that goes on to fill it writes behind what they hold.

Letters: S rows of the tables, G groups, M pages per group, P pages of the pool.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.infer.cache import Cache, PagedCache
from mor_jax.infer.engine_state import FREE, EngineState, hold_state

AnyArray = Any
"""An array of the device, or of the host before it is handed over."""


@struct.dataclass
class Orders:
    """What rows of the page tables give back and get."""

    drop_S: AnyArray
    """bool: give back all that the row holds; a place is empty afterwards."""
    source_S: AnyArray
    """int32: the row, as it is before all this, whose first entries this row gets; -1 is none. What the row itself held
    must have been dropped."""
    lengths: tuple[AnyArray, ...]
    """Per pool, int32 [S, G]: how many entries of each group."""


@functools.partial(jax.jit, donate_argnums=0)
def exchange(state: EngineState, orders: Orders) -> EngineState:
    """Carry out orders; there must be pages for the copies, those that are given back included."""
    places, cache = state.phase_S.shape[0], state.cache
    pools = [_exchange(*pool, orders, places) for pool in zip(cache.pools, orders.lengths, strict=True)]
    phase_S = jnp.where(orders.drop_S[:places], FREE, state.phase_S)
    cache = Cache(block=pools[0], edge=pools[1] if len(pools) > 1 else None)
    return hold_state(dataclasses.replace(state, cache=cache, phase_S=phase_S))


def _exchange(cache: PagedCache, length_SG: jax.Array, orders: Orders, places: int) -> PagedCache:
    size, table_SGM = cache.page_size, cache.table_SGM
    (rows, groups, most), pages = table_SGM.shape, cache.free_P.shape[0]
    nth_11M, gets_S1 = jnp.arange(most)[None, None], (jnp.asarray(orders.source_S) >= 0)[:, None]
    drop_S1 = jnp.asarray(orders.drop_S)[:, None]
    is_place_S1 = (jnp.arange(rows) < places)[:, None]
    whole_SG, rest_SG = length_SG // size, length_SG % size
    shared_SG = jnp.where(gets_S1, whole_SG + jnp.where(is_place_S1, 0, rest_SG > 0), 0)
    given_SG = jnp.where(drop_S1, -(-cache.length_SG // size), 0)
    taken_SGM = table_SGM.at[orders.source_S].get(mode="clip")

    def count(table_SGM: jax.Array, first_SG: jax.Array) -> jax.Array:
        page_SGM = jnp.where(nth_11M < first_SG[:, :, None], table_SGM, pages)
        return jnp.zeros(pages, jnp.int32).at[page_SGM.reshape(-1)].add(1, mode="drop")

    extra_P = cache.extra_P + count(taken_SGM, shared_SG) - count(table_SGM, given_SG)
    freed_P = extra_P < 0
    slot_P = jnp.where(freed_P, cache.num_free + jnp.cumsum(freed_P) - 1, pages)
    free_P = cache.free_P.at[slot_P].set(jnp.arange(pages, dtype=jnp.int32), mode="drop")
    num_free = cache.num_free + jnp.sum(freed_P, dtype=jnp.int32)
    copies_SG = (gets_S1 & (rest_SG > 0))[:places]
    nth_SG = jnp.cumsum(copies_SG.reshape(-1)).reshape(copies_SG.shape) - 1
    fresh_SG = free_P.at[num_free - 1 - nth_SG].get(mode="clip")
    whole_SG1 = whole_SG[:places, :, None]
    old_SG = jnp.take_along_axis(taken_SGM[:places], whole_SG1, axis=2, mode="clip")[:, :, 0]
    to_SG = jnp.where(copies_SG, fresh_SG, pages)
    # all are read before any is written: a fresh page may be one that another copy is made of
    copy = lambda pool: pool.at[to_SG.reshape(-1)].set(pool[old_SG.reshape(-1)], mode="drop")  # noqa: E731
    column_SG = jnp.where(copies_SG, whole_SG[:places], most)
    row_S1, group_1G = jnp.arange(places)[:, None], jnp.arange(groups)[None, :]
    new_SGM = jnp.where(gets_S1[:, :, None], taken_SGM, table_SGM)
    return dataclasses.replace(
        cache,
        keys=jax.tree.map(copy, cache.keys),
        values=jax.tree.map(copy, cache.values),
        table_SGM=new_SGM.at[row_S1, group_1G, column_SG].set(fresh_SG, mode="drop"),
        length_SG=jnp.where(gets_S1, length_SG, jnp.where(drop_S1, 0, cache.length_SG)),
        free_P=free_P,
        num_free=num_free - jnp.sum(copies_SG, dtype=jnp.int32),
        extra_P=jnp.where(freed_P, 0, extra_P),
    )

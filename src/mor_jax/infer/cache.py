"""Paged key/value caches: pages per sequence and recursion, so that memory follows the tokens that came that deep.

Paper section 2.2.2 and table 2. A *group* is one list of pages of a sequence: recursion r's under recursion-wise
caching (it holds only the tokens that reached r), or the single one that all recursions share. A page holds Z
consecutive entries of its group in every layer of the block. The free list lies on the device, as a stack. Rows of the
page tables may hold the same pages (``exchange``).

A page is one row of its pool, X = Z * K * H numbers wide: the heads of its first entry, then those of the second, and
so on. Devices that share the heads cut this row, and each has its share of all entries. A TPU keeps such a pool as it
is; were entries and heads axes of their own, it would fill up their tiles, and programs would work on a copy of all.

In int8 a pool has a second array, of scales, laid out likewise (``kernels.int8_pages``).

Letters: S sequences (rows of the page tables), G groups, M pages per group, P pages of the pool, Z entries per page,
B rows, T tokens, K H heads.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig
from mor_jax.errors import require
from mor_jax.infer.engine_options import KvDtype
from mor_jax.kernels.int8_pages import Int8Pages, KeyValuePages, Pages, quantize
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.devices import target_platform


@dataclass(frozen=True)
class KvLayout:
    """How many caches of what depth a model keeps."""

    passes: int
    """Passes over the block that a token takes at most (1 where layers repeat in place)."""
    groups: int
    """Page lists per sequence in the block."""
    block_layers: int
    """Layers that one page of the block covers."""
    edge_layers: int
    """First and last layer (2), or none."""
    holds_all: bool
    """Whether the block's one group holds every token: keys and values that the recursions share."""


def kv_layout(config: ModelConfig) -> KvLayout:
    """Return the layout of a model's caches."""
    recursion, depth = config.recursion, config.block_depth
    own = recursion.num_recursions if recursion.kv_strategy == "recursion" else 1
    edges, shared = 2 if recursion.has_middle else 0, recursion.kv_strategy == "shared"
    if recursion.is_sequence:
        return KvLayout(1, 1, block_layers=depth * own, edge_layers=edges, holds_all=shared)
    return KvLayout(recursion.num_recursions, own, block_layers=depth, edge_layers=edges, holds_all=shared)


POOL_AXES = (None, "kv_heads")
"""Logical axes of a pool."""


@struct.dataclass
class PagedCache:
    """One pool of pages and who holds them."""

    keys: tuple[Pages, ...]
    """Per layer [P, X], rotated."""
    values: tuple[Pages, ...]
    """Per layer [P, X]."""
    table_SGM: jax.Array
    """int32: m-th page of a sequence's group; meaningless beyond its length."""
    length_SG: jax.Array
    """int32: entries held."""
    free_P: jax.Array
    """int32: stack of free pages."""
    num_free: jax.Array
    """int32 scalar: its height."""
    extra_P: jax.Array
    """int32: rows of the table that hold a page, beyond one; 0 for free ones. See ``exchange``."""
    page_size: int = struct.field(pytree_node=False)
    """Z."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all its layers, keys and values."""
        return sum(array.nbytes // array.shape[0] for array in jax.tree.leaves((self.keys, self.values)))


@struct.dataclass
class Cache:
    """Everything that a model keeps of the tokens it has read."""

    block: PagedCache
    edge: PagedCache | None
    """Of the first and the last layer, where the model has them."""

    @property
    def pools(self) -> tuple[PagedCache, ...]:
        """The pools there are."""
        return (self.block,) if self.edge is None else (self.block, self.edge)


def hold_cache(cache: Cache) -> Cache:
    """Keep pools split over their heads, and their tables whole on every device; without a mesh, do nothing."""

    def hold(pool: PagedCache) -> PagedCache:
        split = functools.partial(jax.tree.map, lambda array: constrain(array, *POOL_AXES))
        return dataclasses.replace(jax.tree.map(constrain, pool), keys=split(pool.keys), values=split(pool.values))

    return jax.tree.map(hold, cache, is_leaf=lambda node: isinstance(node, PagedCache))


@dataclass(frozen=True)
class CacheShape:
    """Static sizes of a cache."""

    sequences: int
    """S: sequences that hold pages at the same time."""
    max_length: int
    """Tokens of one sequence at most."""
    page_size: int = 16
    """Z: entries per page."""
    block_pages: int | None = None
    """Pages of the block's pool; None is enough for every sequence at its longest and deepest."""
    edge_pages: int | None = None
    """Pages of the first and last layers' pool; None likewise."""
    kept: int = 0
    """Further rows of the page tables: of sequences that have ended, and whose pages may be wanted again."""
    kv_dtype: KvDtype = "model"
    """What keys and values are kept in."""

    def __post_init__(self) -> None:
        for name in ("sequences", "max_length", "page_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")

    @property
    def pages_per_group(self) -> int:
        """M."""
        return -(-self.max_length // self.page_size)


def init_cache(config: ModelConfig, shape: CacheShape) -> Cache:
    """Make an empty cache; every page is free.

    Args:
        config: the model.
        shape: its sizes; the pools hold ``block_pages`` and ``edge_pages`` pages.
    """
    layout, most = kv_layout(config), shape.sequences * shape.pages_per_group
    rows = shape.sequences + shape.kept

    def pool(layers: int, groups: int, pages: int | None) -> PagedCache:
        pages = groups * most if pages is None else pages
        empty = lambda: tuple(_empty_pages(config, shape, pages) for _ in range(layers))  # noqa: E731
        return PagedCache(
            keys=empty(),
            values=empty(),
            table_SGM=jnp.zeros((rows, groups, shape.pages_per_group), jnp.int32),
            length_SG=jnp.zeros((rows, groups), jnp.int32),
            free_P=jnp.arange(pages, dtype=jnp.int32),
            num_free=jnp.array(pages, jnp.int32),
            extra_P=jnp.zeros(pages, jnp.int32),
            page_size=shape.page_size,
        )

    edge = pool(layout.edge_layers, 1, shape.edge_pages) if layout.edge_layers else None
    return Cache(block=pool(layout.block_layers, layout.groups, shape.block_pages), edge=edge)


def _empty_pages(config: ModelConfig, shape: CacheShape, pages: int) -> Pages:
    heads = shape.page_size * config.num_kv_heads
    if shape.kv_dtype == "model":
        return jnp.zeros((pages, heads * config.head_dim), config.dtype)
    numbers_PX = jnp.zeros((pages, heads * config.head_dim), jnp.int8)
    return Int8Pages(numbers_PX, jnp.zeros((pages, heads), jnp.bfloat16))


def entry_bytes(config: ModelConfig, kv_dtype: KvDtype) -> int:
    """Bytes of an entry's keys and values in one layer."""
    of_head = config.head_dim * jnp.dtype(config.dtype).itemsize if kv_dtype == "model" else config.head_dim + 2
    return 2 * config.num_kv_heads * of_head


def reserve(
    cache: PagedCache, sequence_B: jax.Array, group_B: jax.Array, count_B: jax.Array, most: int
) -> tuple[PagedCache, jax.Array]:
    """Lengthen groups by new entries, taking pages from the free list where their last page is full.

    Args:
        cache: the pool; whoever admits sequences sees to it that pages never run out.
        sequence_B: sequence of each row; no (sequence, group) twice.
        group_B: group of each row.
        count_B: entries to add; rows with 0 may name any sequence.
        most: static bound of ``count_B``.

    Returns:
        The cache, and the entries that each row's group held before.
    """
    size, sequences = cache.page_size, cache.length_SG.shape[0]
    start_B = cache.length_SG.at[sequence_B, group_B].get(mode="clip")
    held_B = (start_B + size - 1) // size
    needed_B = jnp.where(count_B > 0, (start_B + count_B + size - 1) // size - held_B, 0)
    before_B = jnp.cumsum(needed_B) - needed_B
    # one page more than whole pages: the entries may begin in the middle of one
    nth_X = jnp.arange(-(-most // size) + (1 if most > 1 else 0))
    takes_BX = nth_X[None, :] < needed_B[:, None]
    page_BX = cache.free_P.at[cache.num_free - 1 - before_B[:, None] - nth_X[None, :]].get(mode="clip")
    row_BX = jnp.where(takes_BX, sequence_B[:, None], sequences)
    table_SGM = cache.table_SGM.at[row_BX, group_B[:, None], held_B[:, None] + nth_X[None, :]].set(page_BX, mode="drop")
    row_B = jnp.where(count_B > 0, sequence_B, sequences)
    length_SG = cache.length_SG.at[row_B, group_B].add(count_B, mode="drop")
    num_free = cache.num_free - jnp.sum(needed_B)
    return dataclasses.replace(cache, table_SGM=table_SGM, length_SG=length_SG, num_free=num_free), start_B


@jax.named_scope("cache_pages")
def append(
    cached: KeyValuePages, fresh: KeyValue, table_BM: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> KeyValuePages:
    """Write new entries of one layer behind those that rows hold.

    Args:
        cached: keys and values [P, X].
        fresh: keys and values [B, T, K, H]; the first ``count_B`` of each row are written.
        table_BM: pages of each row's group.
        start_B: entries held before.
        count_B: entries to write.
    """
    put = _put_pages if target_platform() == "tpu" else _put_entries

    def write(pages: Pages, new_BTKH: jax.Array) -> Pages:
        if not isinstance(pages, Int8Pages):
            return put(pages, new_BTKH, table_BM, start_B, count_B)
        parts = zip(jax.tree.leaves(pages), quantize(new_BTKH), strict=True)
        return Int8Pages(*(put(pool, new, table_BM, start_B, count_B) for pool, new in parts))

    return write(cached[0], fresh[0]), write(cached[1], fresh[1])


def _put_entries(
    pool_PX: jax.Array, new: jax.Array, table_BM: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> jax.Array:
    """Scatter every entry to its place in its page; ``new`` is [B, T, ...]."""
    new_BTY, nth_T = new.reshape(*new.shape[:2], -1), jnp.arange(new.shape[1])
    (pages, page_width), width = pool_PX.shape, new_BTY.shape[2]
    size, entry_BT = page_width // width, start_B[:, None] + nth_T[None, :]
    page_BT = jnp.take_along_axis(table_BM, entry_BT // size, axis=1, mode="clip")
    page_BT = jnp.where(nth_T[None, :] < count_B[:, None], page_BT, pages)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    corner_BT2 = jnp.stack([page_BT, entry_BT % size * width], axis=-1)
    drop = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(pool_PX, corner_BT2, new_BTY, dimensions, mode=drop)


def _put_pages(
    pool_PX: jax.Array, new: jax.Array, table_BM: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> jax.Array:
    """Rewrite the pages that the entries come into, as ``_put_entries`` does.

    A TPU scatters whole rows at once, but parts of rows in a loop over all of them, at 7,000 to 8,000 cycles each.
    """
    new_BTY = new.reshape(*new.shape[:2], -1)
    (rows, length, width), (pages, page_width) = new_BTY.shape, pool_PX.shape
    size = page_width // width
    nth_N = jnp.arange(-(-(length - 1) // size) + 1)  # the entries may begin in the middle of a page
    page_BN = jnp.take_along_axis(table_BM, start_B[:, None] // size + nth_N[None], axis=1, mode="clip")
    begin_B1 = start_B[:, None] % size
    written_BN = (nth_N[None] * size < begin_B1 + count_B[:, None]) & (count_B[:, None] > 0)
    token_BE = jnp.arange(nth_N.size * size)[None] - begin_B1  # that comes to each entry of these pages
    new_BEY = jnp.take_along_axis(new_BTY, token_BE[:, :, None], axis=1, mode="clip")
    token_BX = (jnp.arange(nth_N.size * page_width) // width)[None] - begin_B1
    fresh_BX = (token_BX >= 0) & (token_BX < count_B[:, None])
    old_BX = pool_PX.at[page_BN].get(mode="clip").reshape(rows, -1)
    pages_BX = jnp.where(fresh_BX, new_BEY.reshape(rows, -1), old_BX)
    page_BN = jnp.where(written_BN, page_BN, pages)
    return pool_PX.at[page_BN].set(pages_BX.reshape(rows, -1, page_width), mode="drop")


@dataclass(frozen=True)
class KvUsage:
    """Bytes of keys and values."""

    used: int
    """Of the tokens cached, once for every sequence that holds them."""
    allocated: int
    """Of the pages that hold them."""
    reserved: int
    """Of the pools."""


def kv_usage(cache: Cache) -> KvUsage:
    """Measure a cache."""
    used = allocated = reserved = 0
    for pool in cache.pools:
        pages = pool.free_P.shape[0]
        length_SG, num_free = jax.device_get((pool.length_SG, pool.num_free))  # sums here would compile
        used += int(length_SG.sum()) * pool.page_bytes // pool.page_size
        allocated += (pages - int(num_free)) * pool.page_bytes
        reserved += pages * pool.page_bytes
    return KvUsage(used=used, allocated=allocated, reserved=reserved)

"""Attention over a paged cache: the plain path that runs everywhere, and the choice of a kernel.

Letters: B rows, T tokens of a row, M pages per group, Z entries per page, X entries of a block, N K H heads, G = N/K.
"""

import functools
import logging
import math
from typing import get_args

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.errors import require
from mor_jax.infer.cache import POOL_AXES, append
from mor_jax.infer.engine_options import DecodeBackend, KvDtype
from mor_jax.kernels.attention import hopper as attention_hopper
from mor_jax.kernels.attention.triton import flash_attention
from mor_jax.kernels.attention.triton_kernels import Tiling
from mor_jax.kernels.decode_attention import attend_to_pages, decode_attention
from mor_jax.kernels.int8_pages import KeyValuePages, gather_pages
from mor_jax.kernels.pallas_triton import is_available
from mor_jax.kernels.rotary import Rotary, apply_rotary
from mor_jax.mesh.axes import on_shards
from mor_jax.mesh.devices import process_platform, target_platform

logger = logging.getLogger(__name__)
PROMPT_BLOCK, TOKEN_BLOCK = 2048, 512
"""Entries that a chunk of a prompt, and single tokens, attend to at a time; groups that may hold more are read block by
block. Many, as on a GPU the host decides about every round of the loop; so single tokens read all there, and chunks
too where a kernel can (``prompts_backend``)."""
_HEADS, _KV_HEADS = (None, None, "heads", None), (None, None, "kv_heads", None)
_POOLS = (POOL_AXES, POOL_AXES)


@functools.cache
def _resolve(name: str, backend: DecodeBackend, needs: tuple[tuple[str, bool], ...]) -> DecodeBackend:
    """Choose a backend, and log it once; ``needs`` names what `pallas` needs, and whether it is there."""
    allowed = get_args(DecodeBackend)
    require(backend in allowed, f"{name}={backend!r} is not one of {', '.join(map(repr, allowed))}")
    missing = [need for need, is_there in needs if not is_there]
    require(backend != "pallas" or not missing, f"{name}='pallas' needs {' and '.join(missing)}")
    chosen: DecodeBackend = ("xla" if missing else "pallas") if backend == "auto" else backend
    logger.info("decoding, %s: %s (asked for %s)", name, chosen, backend)
    return chosen


def _gpu() -> tuple[str, bool]:
    device = process_platform()
    return f"a GPU, not device={device!r}", device == "gpu"


def _triton() -> tuple[str, bool]:
    return "a JAX that has Pallas' Triton backend", is_available()


def _width(head_dim: int) -> tuple[str, bool]:
    fits = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    return f"head_dim a power of 2 from 16, not {head_dim}", fits


def _alone(shards: int) -> tuple[str, bool]:
    return f"an engine on one device, not mesh.tensor={shards}", shards == 1


def decode_backend(
    config: ModelConfig, backend: DecodeBackend = "auto", shards: int = 1, kv_dtype: KvDtype = "model"
) -> DecodeBackend:
    """Choose how single tokens attend to the cache on this process's device.

    `pallas` is one kernel that appends and attends; it needs a GPU of its own (``shards`` is 1), a head_dim that is a
    power of 2 from 16, and pages in the model's dtype. `xla` gathers the pages first and runs everywhere.

    Raises:
        UserError: `pallas` was asked for where it cannot run.
    """
    plain = ("kv_dtype='model', not 'int8'", kv_dtype == "model")
    return _resolve("backend", backend, (_gpu(), _triton(), _alone(shards), _width(config.head_dim), plain))


def prompts_backend(dtype: str, head_dim: int) -> DecodeBackend:
    """Choose how chunks of prompts attend to the cache where the program will run.

    `pallas` gathers the pages and runs the training's flash attention, whose products round to 16 bits; `xla` reads
    many entries block by block (``attend_by_blocks``).
    """
    device = target_platform()
    needs = (
        (f"a GPU, not device={device!r}", device == "gpu"),
        (f"16 bits, not {dtype}", jnp.dtype(dtype).itemsize == 2),
        _width(head_dim),
    )
    if not attention_hopper.is_available(jnp.dtype(dtype).name, head_dim):
        needs = (*needs, _triton())
    return _resolve("prompts", "auto", needs)


def split_last_heads(joint: jax.Array, count: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Split the last ``count`` heads off a joint projection: (the others, these).

    Args:
        joint: [..., heads, head dim]. It holds queries, keys and values shard by shard, so that every device has those
            that belong together, and the split moves nothing.
        count: heads to split off, over all shards.
        shards: devices that share the heads.
    """
    *lead, heads, head_dim = joint.shape
    by_shard = joint.reshape(*lead, shards, heads // shards, head_dim)
    parts = jnp.split(by_shard, [(heads - count) // shards], axis=-2)
    rest, last = (part.reshape(*lead, -1, head_dim) for part in parts)
    return rest, last


@struct.dataclass
class PagedStore:
    """The groups that a batch of rows reads and writes: what layers attend through."""

    table_BM: jax.Array
    """int32: pages of each row's group."""
    start_B: jax.Array
    """int32: entries that it held before this call."""
    count_B: jax.Array
    """int32: leading tokens of the row that are appended."""
    visible_BT: jax.Array
    """int32: leading entries, those appended included, that each query attends to; 0 for queries that nobody reads."""
    page_size: int = struct.field(pytree_node=False)
    """Z."""
    writes: bool = struct.field(pytree_node=False, default=True)
    """Whether any row appends."""
    backend: DecodeBackend = struct.field(pytree_node=False, default="xla")
    """Attention of single tokens, resolved."""
    shards: int = struct.field(pytree_node=False, default=1)
    """Devices that share the heads."""
    table_YM: jax.Array | None = None
    """int32: pages of every group there is, for the kernel, which looks up its own; None: ``table_BM`` are all."""
    group_B: jax.Array | None = None
    """int32: the group of each row among them."""

    @jax.named_scope("attend")
    def attend(
        self, projected_BTMH: jax.Array, cached: KeyValuePages, rotary: Rotary
    ) -> tuple[jax.Array, KeyValuePages]:
        """Append one layer's new entries and attend; queries that see nothing return an arbitrary finite value.

        Args:
            projected_BTMH: N queries and, if the store writes, K keys and K values, none of them rotated; the heads of
                several devices lie as ``split_last_heads`` says.
            cached: the layer's keys and values [P, X].
            rotary: tables at the tokens' positions.

        Returns:
            Output [B, T, N, H], and the cache.
        """
        if self.backend == "pallas" and projected_BTMH.shape[1] == 1 and self.writes:
            angles = (rotary[0][:, 0, 0], rotary[1][:, 0, 0])
            tables = (
                (self.table_BM, jnp.arange(self.start_B.shape[0]))
                if self.table_YM is None
                else (self.table_YM, self.group_B)
            )
            sizes = (self.start_B, self.count_B, self.visible_BT[:, 0])
            keys, values = cached
            assert isinstance(keys, jax.Array), "decode_backend refuses int8"
            assert isinstance(values, jax.Array)
            out_BNH, cached = decode_attention(
                projected_BTMH[:, 0], angles, (keys, values), *tables, *sizes, page_size=self.page_size
            )
            return out_BNH[:, None], cached
        if not self.writes:
            return self._attend(apply_rotary(projected_BTMH, rotary), cached), cached
        kv_heads = cached[0].shape[1] // (self.page_size * projected_BTMH.shape[3])
        rotated, values = split_last_heads(projected_BTMH, kv_heads, self.shards)
        query_BTNH, keys = split_last_heads(apply_rotary(rotated, rotary), kv_heads, self.shards)
        # a page's share of a device is whole entries of its heads, which the partitioner cannot know
        write = on_shards(append, (_POOLS, (_KV_HEADS, _KV_HEADS), (), (), ()), _POOLS)
        cached = write(cached, (keys, values), self.table_BM, self.start_B, self.count_B)
        return self._attend(query_BTNH, cached), cached

    def _attend(self, query_BTNH: jax.Array, cached: KeyValuePages) -> jax.Array:
        local = functools.partial(_gather_and_attend, page_size=self.page_size)
        attend = on_shards(local, (_HEADS, _POOLS, (), ()), _HEADS)
        return attend(query_BTNH, cached, self.table_BM, self.visible_BT)


def _gather_and_attend(
    query_BTNH: jax.Array, cached: KeyValuePages, table_BM: jax.Array, visible_BT: jax.Array, *, page_size: int
) -> jax.Array:
    single = query_BTNH.shape[1] == 1
    if not single and prompts_backend(query_BTNH.dtype.name, query_BTNH.shape[-1]) == "pallas":
        return attend_by_kernel(query_BTNH, cached, table_BM, visible_BT, page_size)
    block = TOKEN_BLOCK if single else PROMPT_BLOCK
    if table_BM.shape[1] * page_size > block and not (single and target_platform() == "gpu"):
        return attend_by_blocks(query_BTNH, cached, table_BM, visible_BT, page_size, max(1, block // page_size))
    return attend_to_pages(query_BTNH, cached, table_BM, visible_BT, page_size)


def attend_by_kernel(
    query_BTNH: jax.Array,
    cached: KeyValuePages,
    table_BM: jax.Array,
    visible_BT: jax.Array,
    page_size: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Copy the pages of every row one after the other, and attend by the flash attention of training.

    The copy is of all pages that a row may have, so memory and time grow with the longest sequence that the engine
    allows; the kernel reads up to the last entry that a block of queries sees.

    Args:
        query_BTNH: rotated, of 16 bits.
        cached: keys and values [P, Z * K * H] of one layer.
        table_BM: int32 pages of each row's group.
        visible_BT: int32 leading entries that each query sees; one that sees none returns zeros.
        page_size: Z.
        interpret: run in Pallas' interpreter, for tests.

    Returns:
        Output [B, T, N, H] in the queries' dtype; sums are float32.
    """
    multiple = math.lcm(Tiling().key_multiple, page_size) // page_size
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % multiple)))  # or the copy would be copied
    width, dtype = query_BTNH.shape[-1], query_BTNH.dtype
    keys, values = (gather_pages(pages, table_BM, page_size, width, dtype) for pages in cached)
    if not interpret and attention_hopper.is_available(dtype.name, width):
        return attention_hopper.flash_attention(query_BTNH, keys, values, None, visible_BT)
    return flash_attention(query_BTNH, keys, values, None, visible_BT, interpret=interpret)


def attend_by_blocks(
    query_BTNH: jax.Array, cached: KeyValuePages, table_BM: jax.Array, visible_BT: jax.Array, page_size: int, pages: int
) -> jax.Array:
    """Attend to some pages at a time, up to the last one that any query sees.

    A dense copy of a group and its scores would grow with the longest sequence that the engine allows, and a chunk at
    the beginning of a prompt would take as long as one at its end.

    Args:
        query_BTNH: rotated.
        cached: keys and values [P, Z * K * H] of one layer.
        table_BM: int32 pages of each row's group.
        visible_BT: int32 leading entries that each query sees; one that sees none returns zeros.
        page_size: Z.
        pages: to read at a time.

    Returns:
        Output [B, T, N, H] in the queries' dtype; sums are float32.
    """
    rows, length, heads, width = query_BTNH.shape
    kv_heads, size = cached[0].shape[1] // (page_size * width), pages * page_size
    query_BTKGH = query_BTNH.reshape(rows, length, kv_heads, heads // kv_heads, width)
    # a last block that is not whole begins earlier: entries that were read already are masked
    last_page, most = table_BM.shape[1] - pages, jnp.max(visible_BT)

    def read(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        nth, top_BKGT, total_BKGT, sum_BKGTH = state
        first = jnp.minimum(nth * pages, last_page)
        page_BM = jax.lax.dynamic_slice_in_dim(table_BM, first, pages, axis=1)
        keys_BXKH, values_BXKH = (gather_pages(pool, page_BM, page_size, width, query_BTNH.dtype) for pool in cached)
        entry_X = first * page_size + jnp.arange(size)
        fresh_X = entry_X >= nth * size
        mask_BTX = fresh_X[None, None, :] & (entry_X[None, None, :] < visible_BT[:, :, None])
        score_BKGTX = jnp.einsum("BTKGH,BXKH->BKGTX", query_BTKGH, keys_BXKH, preferred_element_type=jnp.float32)
        score_BKGTX = jnp.where(mask_BTX[:, None, None], score_BKGTX * width**-0.5, -jnp.inf)
        new_top_BKGT = jnp.maximum(top_BKGT, jnp.max(score_BKGTX, axis=-1))
        weight_BKGTX, kept_BKGT = jnp.exp(score_BKGTX - new_top_BKGT[..., None]), jnp.exp(top_BKGT - new_top_BKGT)
        fresh_BKGTH = jnp.einsum(
            "BKGTX,BXKH->BKGTH", weight_BKGTX.astype(values_BXKH.dtype), values_BXKH, preferred_element_type=jnp.float32
        )
        total_BKGT = total_BKGT * kept_BKGT + jnp.sum(weight_BKGTX, axis=-1)
        return nth + 1, new_top_BKGT, total_BKGT, sum_BKGTH * kept_BKGT[..., None] + fresh_BKGTH

    shape = (rows, kv_heads, heads // kv_heads, length)
    # a finite start: a query that sees nothing has no maximum
    state = (jnp.zeros((), jnp.int32), jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros((*shape, width)))
    state = jax.lax.while_loop(lambda state: state[0] * size < most, read, state)
    out_BKGTH = state[3] / jnp.maximum(state[2], 1e-30)[..., None]
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(query_BTNH.shape).astype(query_BTNH.dtype)

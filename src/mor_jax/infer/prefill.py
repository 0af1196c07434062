"""Reading prompts into the caches, whole or in chunks, for rows of different lengths.

Each recursion computes only the tokens that reach it, a few at a time, so the work follows the routing as the memory
does. Letters: B rows, T tokens of a chunk, C tokens computed at a time, D width, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.infer.cache import Cache, PagedCache, hold_cache, kv_layout, reserve
from mor_jax.infer.decode_layers import block_pass, decode_context, edge_layer, embed, logits
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_state import pack_alternatives
from mor_jax.infer.paged_attention import PagedStore
from mor_jax.infer.sampling import most_likely
from mor_jax.infer.walk import Walk, advance, start_walk
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.devices import target_platform
from mor_jax.model.routing.select import take_rows

_AT_ONCE = 256
"""Tokens of a row that a GPU computes in every pass without asking how many reached it."""
_SCORED = 128
"""Tokens whose logits there are at a time."""


@struct.dataclass
class PrefillOutput:
    """What a chunk gives beside the caches."""

    logits_BTV: jax.Array | None
    """float32, if asked for; arbitrary at tokens beyond a row's count."""
    depth_BT: jax.Array
    """int32: passes that each token completed."""
    scores_BTF: jax.Array | None = None
    """int32, if targets were given: the bits of each target's float32 log-probability, then the packed most likely
    tokens (``pack_alternatives``); arbitrary where no target is."""


@functools.partial(jax.jit, static_argnames=("piece", "return_logits"), donate_argnums=1)
def prefill(
    model: DecodeModel,
    cache: Cache,
    sequence_B: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    max_depth_B: jax.Array,
    targets_BT: jax.Array | None = None,
    *,
    piece: int | None = None,
    return_logits: bool = False,
) -> tuple[Cache, PrefillOutput]:
    """Read the next tokens of some sequences.

    Args:
        model: the model.
        cache: donated.
        sequence_B: int32 place of each row in the cache; no place twice.
        tokens_BT: int32, each row padded at its end.
        start_B: int32 tokens that the sequence has already read.
        count_B: int32 tokens to read; a row with 0 does nothing.
        max_depth_B: int32 budget of passes per token.
        targets_BT: int32 tokens to score, each after the token at its place; -1 is none. None scores nothing, which
            is another program: a prompt that only needs its keys does without the last layer's output and the head.
        piece: tokens per row that a recursion computes at a time; None is a quarter of T, at least 64, and on a GPU
            what a recursion has capacity for in training and some more (of short chunks, all).
        return_logits: whether to compute the last layer's output and the logits; a prompt only needs its keys.

    Returns:
        The cache, and logits and depths.
    """
    length = tokens_BT.shape[1]
    nth_1T = jnp.arange(length)[None, :]
    positions_BT, valid_BT = start_B[:, None] + nth_1T, nth_1T < count_B[:, None]
    cache, edge_store = _edge_store(cache, sequence_B, count_B, positions_BT, valid_BT)
    context = decode_context(model, positions_BT, edge_store)
    x_BTD, edge = edge_layer(model, cache.edge, embed(model, tokens_BT), context, 0)
    walk = start_walk(model, x_BTD, jnp.broadcast_to(max_depth_B[:, None], tokens_BT.shape))
    walk = dataclasses.replace(walk, going_BT=walk.going_BT & valid_BT)
    for recursion in range(kv_layout(model.config).passes):
        size = _piece(model.config.capacities[recursion] * length, length) if piece is None else piece
        out_BTD, cache = _pass(model, cache, walk, positions_BT, sequence_B, recursion, min(size, length))
        walk = advance(model, walk, out_BTD)
    x_BTD, edge = edge_layer(model, edge, walk.x_BTD, context, 1)
    scores_BTF = None
    if targets_BT is not None:
        scores_BTF = constrain(_score(model, x_BTD, targets_BT))
    cache = hold_cache(dataclasses.replace(cache, edge=edge))
    depth_BT = jnp.where(valid_BT, walk.depth_BT, 0)
    return cache, PrefillOutput(logits(model, x_BTD) if return_logits else None, depth_BT, scores_BTF)


def _score(model: DecodeModel, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Score targets, some of one row at a time: logits of a whole chunk take gigabytes, and rows may have none."""
    rows, length, width = x_BTD.shape
    columns = next(n for n in range(min(_SCORED, length), 0, -1) if length % n == 0)

    def score(x_1CD: jax.Array, targets_1C: jax.Array) -> jax.Array:
        logits_1CV = logits(model, x_1CD)
        picked_1C1 = jnp.take_along_axis(logits_1CV, jnp.maximum(targets_1C, 0)[:, :, None], axis=-1)
        picked_1C1 = picked_1C1 - jax.nn.logsumexp(logits_1CV, axis=-1, keepdims=True)
        bits_1C1 = jax.lax.bitcast_convert_type(picked_1C1, jnp.int32)
        return jnp.concatenate([bits_1C1, pack_alternatives(most_likely(logits_1CV, model.known_tokens))], axis=-1)

    def piece(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        like = jax.eval_shape(score, *inputs)
        nothing = lambda *_: jnp.zeros(like.shape, like.dtype)  # noqa: E731
        return jax.lax.cond(jnp.any(inputs[1] >= 0), score, nothing, *inputs)

    x_I1CD, targets_I1C = x_BTD.reshape(-1, 1, columns, width), targets_BT.reshape(-1, 1, columns)
    return jax.lax.map(piece, (x_I1CD, targets_I1C)).reshape(rows, length, -1)


def _piece(expected: float, length: int) -> int:
    """A GPU computes many rows as fast as few; elsewhere a chunk that a prompt does not fill costs what it holds."""
    if target_platform() == "gpu":
        return length if length <= _AT_ONCE else 64 * math.ceil(1.1 * expected / 64)
    return max(64, length // 4)


def _edge_store(
    cache: Cache, sequence_B: jax.Array, count_B: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array
) -> tuple[Cache, PagedStore]:
    """Pages for the first and last layers, which see every token; without them an empty store."""
    visible_BT = jnp.where(valid_BT, positions_BT + 1, 0)
    if cache.edge is None:
        none_B = jnp.zeros_like(count_B)
        return cache, PagedStore(
            jnp.zeros((count_B.shape[0], 1), jnp.int32), none_B, none_B, visible_BT, cache.block.page_size
        )
    group_B = jnp.zeros_like(sequence_B)
    edge, start_B = reserve(cache.edge, sequence_B, group_B, count_B, positions_BT.shape[1])
    store = PagedStore(edge.table_SGM.at[sequence_B, 0].get(mode="clip"), start_B, count_B, visible_BT, edge.page_size)
    return dataclasses.replace(cache, edge=edge), store


def _pass(
    model: DecodeModel,
    cache: Cache,
    walk: Walk,
    positions_BT: jax.Array,
    sequence_B: jax.Array,
    recursion: int,
    piece: int,
) -> tuple[jax.Array, Cache]:
    """The block's output for the tokens that take this pass, which are moved to the front of each row."""
    length = positions_BT.shape[1]
    count_B = jnp.sum(walk.going_BT, axis=1, dtype=jnp.int32)
    order_BT = jnp.argsort(~walk.going_BT, axis=1, stable=True)
    writes = recursion < kv_layout(model.config).groups
    group_B = jnp.full_like(sequence_B, recursion if writes else 0)
    block, start_B = reserve(cache.block, sequence_B, group_B, count_B if writes else jnp.zeros_like(count_B), length)
    table_BM = block.table_SGM.at[sequence_B, group_B].get(mode="clip")
    rows_B1 = jnp.arange(sequence_B.shape[0])[:, None]

    def compute(state: tuple[jax.Array, jax.Array, PagedCache]) -> tuple[jax.Array, jax.Array, PagedCache]:
        first, out_BTD, pool = state
        nth_1C = first + jnp.arange(piece)[None, :]
        index_BC = jnp.take_along_axis(order_BT, jnp.broadcast_to(nth_1C, (count_B.size, piece)), axis=1, mode="clip")
        position_BC = take_rows(positions_BT, index_BC)
        valid_BC = nth_1C < count_B[:, None]
        # shared: entry number and position are the same
        visible_BC = start_B[:, None] + nth_1C + 1 if writes else position_BC + 1
        store = PagedStore(
            table_BM=table_BM,
            start_B=start_B + first,
            count_B=jnp.clip(count_B - first, 0, piece) if writes else jnp.zeros_like(count_B),
            visible_BT=jnp.where(valid_BC, visible_BC, 0),
            page_size=block.page_size,
            writes=writes,
        )
        context = decode_context(model, position_BC, store)
        recursion_B = jnp.full_like(sequence_B, recursion)
        out_BCD, pool = block_pass(model, pool, take_rows(walk.x_BTD, index_BC), context, recursion_B)
        target_BC = jnp.where(valid_BC, index_BC, length)
        return first + piece, out_BTD.at[rows_B1, target_BC].set(out_BCD, mode="drop"), pool

    state = (jnp.zeros((), jnp.int32), jnp.zeros_like(walk.x_BTD), block)
    if piece >= length and target_platform() == "gpu":  # whose host would wait for the answer whether there is more
        _, out_BTD, block = compute(state)
    else:
        _, out_BTD, block = jax.lax.while_loop(lambda state: state[0] < jnp.max(count_B), compute, state)
    return out_BTD, dataclasses.replace(cache, block=block)

"""The model's layers over a paged cache: the training modules, applied one by one (letters: B T D V R L)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import PerfConfig
from mor_jax.infer.attention import PagedStore
from mor_jax.infer.cache import PagedCache
from mor_jax.infer.weights import DecodeModel
from mor_jax.model.attention import LayerContext, TokenView
from mor_jax.model.layers import rms_norm
from mor_jax.model.recursion import make_context
from mor_jax.model.transformer import DecoderLayer


def embed(model: DecodeModel, tokens_BT: jax.Array) -> jax.Array:
    """Return the embeddings [B, T, D] of int32 tokens, in the compute dtype."""
    return jnp.take(model.embedding_VD, tokens_BT, axis=0, mode="clip")


def logits(model: DecodeModel, x_BTD: jax.Array) -> jax.Array:
    """Return float32 logits [B, T, V] of the states after the last layer."""
    hidden_BTD = rms_norm(x_BTD, model.final_norm_D, model.config.norm_epsilon)
    head_VD = model.embedding_VD if model.head_VD is None else model.head_VD
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)


def decode_context(model: DecodeModel, positions_BT: jax.Array, store: PagedStore) -> LayerContext:
    """Context of a pass over cached tokens; positions are rows of a single document."""
    view = TokenView(rows_BC=positions_BT, positions_BC=positions_BT)
    return make_context(model.config, view, store=store)


def edge_layer(
    model: DecodeModel, edge: PagedCache | None, x_BTD: jax.Array, context: LayerContext, index: int
) -> tuple[jax.Array, PagedCache | None]:
    """Apply the first (index 0) or the last (1) layer; models without them return their arguments."""
    if edge is None:
        return x_BTD, edge
    return _layer(model, (model.first, model.last)[index], x_BTD, context, edge, index)


def block_pass(
    model: DecodeModel, cache: PagedCache, x_BTD: jax.Array, context: LayerContext, recursion_B: jax.Array
) -> tuple[jax.Array, PagedCache]:
    """Apply the shared block once; rows may stand at different recursions."""
    recursion = model.config.recursion
    repeats = recursion.num_recursions if recursion.is_sequence else 1
    shares = recursion.kv_strategy == "shared"
    for layer, params in enumerate(model.block):
        for repeat in range(repeats):
            index = layer if shares else layer * repeats + repeat
            reads_only = shares and repeat > 0
            store = context.store
            assert isinstance(store, PagedStore)
            own = dataclasses.replace(context, store=dataclasses.replace(store, writes=store.writes and not reads_only))
            place_B = jnp.full_like(recursion_B, repeat) if recursion.is_sequence else recursion_B
            x_BTD, cache = _layer(model, params, x_BTD, own, cache, index, _norms(model, layer, place_B))
    return x_BTD, cache


def _norms(model: DecodeModel, layer: int, recursion_B: jax.Array) -> Any:
    """Norm scales [B, 1, D] of each row's recursion; None if the layer has its own."""
    if model.norms is None:
        return None
    return jax.tree.map(lambda scale_RLD: scale_RLD[:, layer].at[recursion_B].get(mode="clip")[:, None], model.norms)


def _layer(
    model: DecodeModel,
    params: Any,
    x_BTD: jax.Array,
    context: LayerContext,
    cache: PagedCache,
    index: int,
    norms: Any = None,
) -> tuple[jax.Array, PagedCache]:
    cached = (cache.keys[index], cache.values[index])
    module = DecoderLayer(model.config, PerfConfig())
    output: Any = module.apply({"params": params}, x_BTD, context, cached, norms)
    x_BTD, (keys, values) = output
    replaced = (_put(cache.keys, index, keys), _put(cache.values, index, values))
    return x_BTD, dataclasses.replace(cache, keys=replaced[0], values=replaced[1])


def _put(pools: tuple[jax.Array, ...], index: int, pool: jax.Array) -> tuple[jax.Array, ...]:
    return (*pools[:index], pool, *pools[index + 1 :])

"""The model's layers over a paged cache: the training modules, applied one by one, or their kernels for single tokens.

Letters: B rows, T tokens, D width, V vocabulary, R recursions, L layers, X projected features, Y attention's output.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig, PerfConfig
from mor_jax.infer.cache import PagedCache
from mor_jax.infer.decode_model import DecodeModel, LayerWeights
from mor_jax.infer.paged_attention import PagedStore
from mor_jax.infer.product_kernel import product
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.kernels.norm import rms_norm
from mor_jax.model.decoder_layer import DecoderLayer
from mor_jax.model.layer_context import LayerContext
from mor_jax.model.recurse import make_context


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
    return make_context(model.config, view, store=dataclasses.replace(store, shards=model.shards))


def edge_layer(
    model: DecodeModel, edge: PagedCache | None, x_BTD: jax.Array, context: LayerContext, index: int
) -> tuple[jax.Array, PagedCache | None]:
    """Apply the first (index 0) or the last (1) layer; models without them return their arguments."""
    if edge is None:
        return x_BTD, edge
    weights = (model.first, model.last)[index]
    assert weights is not None
    return _layer(model, weights, x_BTD, context, edge, index)


def block_pass(
    model: DecodeModel, cache: PagedCache, x_BTD: jax.Array, context: LayerContext, recursion_B: jax.Array
) -> tuple[jax.Array, PagedCache]:
    """Apply the shared block once; rows may stand at different recursions."""
    recursion = model.config.recursion
    repeats = recursion.num_recursions if recursion.is_sequence else 1
    shares = recursion.kv_strategy == "shared"
    for layer, weights in enumerate(model.block):
        for repeat in range(repeats):
            index = layer if shares else layer * repeats + repeat
            reads_only = shares and repeat > 0
            store = context.store
            assert isinstance(store, PagedStore)
            own = dataclasses.replace(context, store=dataclasses.replace(store, writes=store.writes and not reads_only))
            place_B = jnp.full_like(recursion_B, repeat) if recursion.is_sequence else recursion_B
            x_BTD, cache = _layer(model, weights, x_BTD, own, cache, index, _norms(model, layer, place_B))
    return x_BTD, cache


def _norms(model: DecodeModel, layer: int, recursion_B: jax.Array) -> Any:
    """Norm scales [B, 1, D] of each row's recursion; None if the layer has its own."""
    if model.norms is None:
        return None
    return jax.tree.map(lambda scale_RLD: scale_RLD[:, layer].at[recursion_B].get(mode="clip")[:, None], model.norms)


def _layer(
    model: DecodeModel,
    weights: LayerWeights,
    x_BTD: jax.Array,
    context: LayerContext,
    cache: PagedCache,
    index: int,
    norms: Any = None,
) -> tuple[jax.Array, PagedCache]:
    store = context.store
    assert isinstance(store, PagedStore)
    if store.products == "pallas" and x_BTD.shape[1] == 1:
        x_BD, cache = _fused_layer(model.config, weights, x_BTD[:, 0], context, cache, index, norms)
        return x_BD[:, None], cache
    cached = (cache.keys[index], cache.values[index])
    module, params = DecoderLayer(model.config, PerfConfig()), weights.module_params(model.config)
    output: Any = module.apply({"params": params}, x_BTD, context, cached, norms)
    x_BTD, cached = output
    return x_BTD, _put(cache, index, cached)


def _fused_layer(
    config: ModelConfig,
    weights: LayerWeights,
    x_BD: jax.Array,
    context: LayerContext,
    cache: PagedCache,
    index: int,
    norms: Any,
) -> tuple[jax.Array, PagedCache]:
    """A layer over one token per row in five kernels: four products, and attention between them."""
    store, rows, head_dim = context.store, x_BD.shape[0], config.head_dim
    assert isinstance(store, PagedStore)
    run = functools.partial(product, epsilon=config.norm_epsilon, interpret=jax.default_backend() == "cpu")
    own = {} if norms is None else {name: norm["scale"][:, 0] for name, norm in norms.items()}
    scales = {"attention_norm": weights.attention_norm_D, "ffn_norm": weights.ffn_norm_D} | own
    heads = config.num_heads + (2 * config.num_kv_heads if store.writes else 0)
    projected_BX, _ = run(x_BD, weights.query_key_value_XD, scale=scales["attention_norm"], outputs=heads * head_dim)
    projected_B1MH = projected_BX.reshape(rows, 1, heads, head_dim)
    out_B1NH, cached = store.attend(projected_B1MH, (cache.keys[index], cache.values[index]), context.rotary)
    out_BY, tickets_X = out_B1NH.reshape(rows, -1), cache.tickets_X
    x_BD, tickets_X = run(out_BY, weights.output_DY, residual_BN=x_BD, tickets_X=tickets_X)
    hidden_BF, _ = run(x_BD, weights.gate_up_2FD, scale=scales["ffn_norm"])
    x_BD, tickets_X = run(hidden_BF, weights.down_DF, residual_BN=x_BD, tickets_X=tickets_X)
    return x_BD, dataclasses.replace(_put(cache, index, cached), tickets_X=tickets_X)


def _put(cache: PagedCache, index: int, cached: KeyValue) -> PagedCache:
    keys, values = (
        (*pools[:index], pool, *pools[index + 1 :])
        for pools, pool in zip((cache.keys, cache.values), cached, strict=True)
    )
    return dataclasses.replace(cache, keys=keys, values=values)

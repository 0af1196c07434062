"""The model's layers over a paged cache, for prompts and single tokens alike: plain functions on ``LayerWeights``.

The training modules are not applied here: they have no cache that outlives a call, and their projections lie otherwise.
That both compute the same is what ``tests/infer/test_exact.py`` holds, token by token.
Letters: B rows, T tokens, D width, V vocabulary, R recursions, L layers, N K heads, M = N + 2K, H head dim, X projected
features, Y attention's output, F feed-forward, P devices that share a layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.infer.cache import PagedCache
from mor_jax.infer.decode_model import DecodeModel, LayerWeights
from mor_jax.infer.paged_attention import PagedStore
from mor_jax.kernels.int8_pages import KeyValuePages
from mor_jax.kernels.norm import rms_norm
from mor_jax.kernels.rotary import Rotary, rotary_tables
from mor_jax.mesh.axes import constrain
from mor_jax.model.modern_parts import mix_joint_values, norm_joint_heads

_norm = jax.named_scope("norm")(rms_norm)
Own = dict[str, jax.Array]
"""What a layer has of its row's recursion: norm scales [B, 1, D]; and its share of the first layer's values."""


@struct.dataclass
class DecodeContext:
    """What the layers of one pass over cached tokens share."""

    rotary: Rotary
    """Tables at the tokens' positions."""
    store: PagedStore
    first_values_BTX: jax.Array | None = None
    """The first layer's values, shard by shard, if ``PartsConfig.value_residual`` is on."""


@jax.named_scope("rotary")
def decode_context(model: DecodeModel, positions_BT: jax.Array, store: PagedStore) -> DecodeContext:
    """Context of a pass over cached tokens; positions are those in a single document."""
    rotary = rotary_tables(positions_BT, model.config.head_dim, model.config.rope_theta)
    return DecodeContext(rotary, dataclasses.replace(store, shards=model.shards))


def embed(model: DecodeModel, tokens_BT: jax.Array) -> jax.Array:
    """Return the embeddings [B, T, D] of int32 tokens, in the compute dtype."""
    return jnp.take(model.embedding_VD, tokens_BT, axis=0, mode="clip")


@jax.named_scope("logits")
def logits(model: DecodeModel, x_BTD: jax.Array) -> jax.Array:
    """Return float32 logits [B, T, V] of the states after the last layer."""
    hidden_BTD = rms_norm(x_BTD, model.final_norm_D, model.config.norm_epsilon)
    head_VD = model.embedding_VD if model.head_VD is None else model.head_VD
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)


def edge_layer(
    model: DecodeModel, edge: PagedCache | None, x_BTD: jax.Array, context: DecodeContext, index: int
) -> tuple[jax.Array, PagedCache | None]:
    """Apply the first (index 0) or the last (1) layer; models without them return their arguments."""
    if edge is None:
        return x_BTD, edge
    weights = (model.first, model.last)[index]
    assert weights is not None
    return _layer(model, weights, x_BTD, context, edge, index)


def block_pass(
    model: DecodeModel, cache: PagedCache, x_BTD: jax.Array, context: DecodeContext, recursion_B: jax.Array
) -> tuple[jax.Array, PagedCache]:
    """Apply the shared block once; rows may stand at different recursions."""
    recursion = model.config.recursion
    repeats = recursion.num_recursions if recursion.is_sequence else 1
    shares = recursion.kv_strategy == "shared"
    context = dataclasses.replace(context, first_values_BTX=_first_values(model, x_BTD))
    for layer, weights in enumerate(model.block):
        for repeat in range(repeats):
            index = layer if shares else layer * repeats + repeat
            writes = context.store.writes and not (shares and repeat > 0)
            own = dataclasses.replace(context, store=dataclasses.replace(context.store, writes=writes))
            place_B = jnp.full_like(recursion_B, repeat) if recursion.is_sequence else recursion_B
            x_BTD, cache = _layer(model, weights, x_BTD, own, cache, index, _own(model, layer, place_B))
    return x_BTD, cache


def _own(model: DecodeModel, layer: int, recursion_B: jax.Array) -> Own:
    """What each row's recursion does not share with the others."""
    of_rows = lambda scale_RX: scale_RX.at[recursion_B].get(mode="clip")[:, None]  # noqa: E731
    own = {name: of_rows(norm["scale"][:, layer]) for name, norm in (model.norms or {}).items()}
    return own if model.value_share_L is None else own | {"value_share": model.value_share_L[layer]}


def _first_values(model: DecodeModel, embedded_BTD: jax.Array) -> jax.Array | None:
    """What ``DecodeContext.first_values_BTX`` is, of a model without shared layers."""
    if model.value_share_L is None:
        return None
    weights, width = model.block[0], embedded_BTD.shape[-1]
    assert weights.attention_norm_D is not None
    values = model.config.num_kv_heads * model.config.head_dim // model.shards
    value_XD = weights.query_key_value_XD.reshape(model.shards, -1, width)[:, -values:].reshape(-1, width)
    normed_BTD = rms_norm(embedded_BTD, weights.attention_norm_D, model.config.norm_epsilon)
    return jnp.einsum("BTD,XD->BTX", normed_BTD, value_XD)


def _layer(
    model: DecodeModel,
    weights: LayerWeights,
    x_BTD: jax.Array,
    context: DecodeContext,
    cache: PagedCache,
    index: int,
    own: Own | None = None,
) -> tuple[jax.Array, PagedCache]:
    """Apply a pre-norm layer, whose keys and values are the ``index``-th of the cache."""
    scales: Any = {"attention_norm": weights.attention_norm_D, "ffn_norm": weights.ffn_norm_D} | (own or {})
    config, cached = model.config, (cache.keys[index], cache.values[index])
    epsilon = config.norm_epsilon
    normed_BTD = _norm(x_BTD, scales["attention_norm"], epsilon)
    delta_BTD, cached = _attention(config, weights, normed_BTD, context, cached, scales.get("value_share"))
    x_BTD = constrain(x_BTD + delta_BTD, "batch", "sequence", None)
    delta_BTD = _feed_forward(weights, _norm(x_BTD, scales["ffn_norm"], epsilon), model.shards)
    return x_BTD + delta_BTD, _put(cache, index, cached)


@jax.named_scope("attention")
def _attention(
    config: ModelConfig,
    weights: LayerWeights,
    x_BTD: jax.Array,
    context: DecodeContext,
    cached: KeyValuePages,
    value_share: jax.Array | None,
) -> tuple[jax.Array, KeyValuePages]:
    """Project by one product, attend through the store, and project back."""
    store, projection_XD, (rows, length, width) = context.store, weights.query_key_value_XD, x_BTD.shape
    if not store.writes:  # queries alone, which lie before the keys and values of each device
        queries = config.num_heads * config.head_dim // store.shards
        projection_XD = projection_XD.reshape(store.shards, -1, width)[:, :queries].reshape(-1, width)
    projected_BTX = jnp.einsum("BTD,XD->BTX", x_BTD, projection_XD)
    projected_BTMH = projected_BTX.reshape(rows, length, -1, config.head_dim)
    projected_BTMH = norm_joint_heads(config, weights.head_norms_H, projected_BTMH, store.shards)
    projected_BTMH = mix_joint_values(config, projected_BTMH, context.first_values_BTX, value_share, store.shards)
    out_BTNH, cached = store.attend(projected_BTMH, cached, context.rotary)
    return jnp.einsum("BTY,DY->BTD", out_BTNH.reshape(rows, length, -1), weights.output_DY), cached


@jax.named_scope("ffn")
def _feed_forward(weights: LayerWeights, x_BTD: jax.Array, shards: int) -> jax.Array:
    """SwiGLU, (silu(x W_gate) * x W_up) W_down, gate and up by one product."""
    rows, length, _ = x_BTD.shape
    hidden_BTX = jnp.einsum("BTD,XD->BTX", x_BTD, weights.gate_up_XD)
    hidden_BTP2F = hidden_BTX.reshape(rows, length, shards, 2, -1)
    activated_BTPF = jax.nn.silu(hidden_BTP2F[:, :, :, 0]) * hidden_BTP2F[:, :, :, 1]
    return jnp.einsum("BTF,DF->BTD", activated_BTPF.reshape(rows, length, -1), weights.down_DF)


def _put(cache: PagedCache, index: int, cached: KeyValuePages) -> PagedCache:
    keys, values = (
        (*pools[:index], pool, *pools[index + 1 :])
        for pools, pool in zip((cache.keys, cache.values), cached, strict=True)
    )
    return dataclasses.replace(cache, keys=keys, values=values)

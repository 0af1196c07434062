"""The modern parts (``PartsConfig``): their parameters, and what they compute; other files only call them.

Letters: B rows, C tokens of a pass, D model, N query heads, K key/value heads, M = N + 2K, H head width, X = K H,
R recursions, L layers in the block, P devices that share a layer.

References: Dehghani et al. (2023) and Henry et al. (2020) for the norms of queries and keys; Zhou et al., Value
Residual Learning (2024).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.array_types import KeyValue, Params
from mor_jax.config import ModelConfig
from mor_jax.kernels.norm import rms_norm

NAMES = ("value_residual",)
"""Entries of the parameter tree, each with a leaf `scale` by recursion; the norms of heads are leaves of the layers."""


class ValueShare(nn.Module):
    """Share [R, L] of the first layer's values, 1/2 at first (as published); R is 1."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        """Return it."""
        axes = {"recursions": self.config.recursion.num_recursions, "layers": self.config.block_depth}
        initialiser = nn.with_logical_partitioning(nn.initializers.constant(0.5), tuple(axes))
        return self.param("scale", initialiser, tuple(axes.values()))


def collect_parts(config: ModelConfig, values_of: Callable[[type[nn.Module], str], Any]) -> dict[str, Any]:
    """Collect what the parts have by recursion, leaves [R, L, ...]; the arguments are ``collect_unshared``'s."""
    return {"value_share": values_of(ValueShare, NAMES[0])} if config.parts.value_residual else {}


class HeadNorm(nn.Module):
    """RMSNorm of every head of queries or keys [B, C, heads, H]; its scale [H] serves all heads of a layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BCNH: jax.Array) -> jax.Array:
        """Normalise."""
        initialiser = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        scale_H: Any = self.param("scale", initialiser, (self.config.head_dim,))
        return rms_norm(x_BCNH, scale_H[None, None, None], self.config.norm_epsilon)


def head_norms(config: ModelConfig) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Return what normalises queries, and what normalises keys, before rotation; for a compact method."""
    if not config.parts.qk_norm:
        return (lambda x_BCNH: x_BCNH), (lambda x_BCNH: x_BCNH)
    return HeadNorm(config, name="query_norm"), HeadNorm(config, name="key_norm")


def norm_joint_heads(
    config: ModelConfig, scales: tuple[jax.Array, jax.Array] | None, projected_BCMH: jax.Array, shards: int
) -> jax.Array:
    """Normalise the heads of a joint projection (decoding).

    Args:
        config: the model.
        scales: of queries and keys, [H] each; None is no norm.
        projected_BCMH: queries, keys and values shard by shard, or queries alone.
        shards: P.
    """
    if scales is None:
        return projected_BCMH
    *lead, heads, head_dim = projected_BCMH.shape
    by_shard = projected_BCMH.reshape(*lead, shards, heads // shards, head_dim)
    queries, keys = config.num_heads // shards, config.num_kv_heads // shards
    split = jnp.split(by_shard, [queries, queries + keys], axis=-2)
    normed = [rms_norm(x, s[None, None, None, None], config.norm_epsilon) for x, s in zip(split, scales, strict=False)]
    return jnp.concatenate([*normed, split[2]], axis=-2).reshape(projected_BCMH.shape)


def first_values(config: ModelConfig, params: Params | None, embedded_BTD: jax.Array) -> jax.Array | None:
    """Values [B, T, X] of the first layer, of which all take a share; projected once more, not carried out of its loop.

    Args:
        config: the model; None is returned where `value_residual` is off.
        params: linen's parameters of the trunk; None while they are made.
        embedded_BTD: embeddings.
    """
    if not config.parts.value_residual:
        return None
    if params is None:
        return jnp.zeros((*embedded_BTD.shape[:2], config.num_kv_heads * config.head_dim), embedded_BTD.dtype)
    layer = jax.tree.map(lambda leaf_LX: leaf_LX[0], params["block"])
    value_DKH = layer["attention"]["key_value"][:, 1].astype(embedded_BTD.dtype)
    normed_BTD = rms_norm(embedded_BTD, layer["attention_norm"]["scale"], config.norm_epsilon)
    values_BTKH = jnp.einsum("BTD,DKH->BTKH", normed_BTD, value_DKH)
    return values_BTKH.reshape(*embedded_BTD.shape[:2], -1)


def mix_values(fresh: KeyValue, first_BCX: jax.Array | None, share: jax.Array | None) -> KeyValue:
    """Fresh keys and values [B, C, K, H], a share of the values taken from the first layer's."""
    if share is None or first_BCX is None:
        return fresh
    keys, values = fresh
    return keys, _mixed(values, first_BCX.reshape(values.shape), share)


def mix_joint_values(
    config: ModelConfig, projected_BCMH: jax.Array, first_BCX: jax.Array | None, share: jax.Array | None, shards: int
) -> jax.Array:
    """``mix_values`` in a joint projection (decoding).

    Args:
        config: the model.
        projected_BCMH: queries, keys and values shard by shard.
        first_BCX: the first layer's values, shard by shard; None mixes nothing.
        share: of the layer.
        shards: P.
    """
    if share is None or first_BCX is None:
        return projected_BCMH
    *lead, heads, head_dim = projected_BCMH.shape
    by_shard = projected_BCMH.reshape(*lead, shards, heads // shards, head_dim)
    others, values = jnp.split(by_shard, [(heads - config.num_kv_heads) // shards], axis=-2)
    values = _mixed(values, first_BCX.reshape(values.shape), share)
    return jnp.concatenate([others, values], axis=-2).reshape(projected_BCMH.shape)


def _mixed(values: jax.Array, first: jax.Array, share: jax.Array) -> jax.Array:
    first32, values32 = first.astype(jnp.float32), values.astype(jnp.float32)
    return (values32 + share * (first32 - values32)).astype(values.dtype)

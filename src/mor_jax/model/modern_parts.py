"""The parts under test (``PartsConfig``): their parameters, and what they compute; other files only call them.

Letters: B rows, C tokens of a pass, D model, N query heads, K key/value heads, M = N + 2K, H head width, X = K H,
R recursions, L layers in the block, V vocabulary, P devices that share a layer.

References: Dehghani et al. (2023) and Henry et al. (2020) for the norms of queries and keys; Gemma 2 (2024) for the
cap; Zhou et al., Value Residual Learning (2024).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.array_types import KeyValue, Params
from mor_jax.config import ModelConfig
from mor_jax.kernels.cross_entropy import soft_cap
from mor_jax.kernels.norm import rms_norm

NAMES = ("residual_scale", "value_residual")
"""Entries of the parameter tree, each with a leaf `scale` by recursion; the norms of heads are leaves of the layers."""


@struct.dataclass
class Carried:
    """What later passes are given of the tokens that they compute."""

    values_BCX: jax.Array
    """Values of the model's first layer, the heads side by side (`value_residual`)."""


class _Stacked(nn.Module):
    """A scale by recursion, with what starts it."""

    config: ModelConfig

    def declare(self, value: float, **axes: int) -> Any:
        """Declare the scale, whose axes beside the recursions are named with their sizes."""
        axes = {"recursions": self.config.recursion.num_recursions, **axes}
        initialiser = nn.with_logical_partitioning(nn.initializers.constant(value), tuple(axes))
        return self.param("scale", initialiser, tuple(axes.values()))


class PassScale(_Stacked):
    """Factor [R] on what the layers of a pass add to the stream, 1 at first."""

    @nn.compact
    def __call__(self) -> Any:
        """Return it."""
        return self.declare(1.0)


class ValueShare(_Stacked):
    """Share [R, L] of the first layer's values, 1/2 at first (as published)."""

    @nn.compact
    def __call__(self) -> Any:
        """Return it."""
        return self.declare(0.5, layers=self.config.block_depth)


def collect_parts(config: ModelConfig, values_of: Callable[[type[nn.Module], str], Any]) -> dict[str, Any]:
    """Collect what the parts have by recursion, leaves [R, L, ...]; the arguments are ``collect_unshared``'s."""
    parts, own = config.parts, {}
    stack = (config.recursion.num_recursions, config.block_depth)
    if parts.residual_scale == "learned":
        own["residual"] = jnp.broadcast_to(values_of(PassScale, NAMES[0])[:, None], stack)
    if parts.value_residual:
        own["value_share"] = values_of(ValueShare, NAMES[1])
    return own


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


def scale_branch(delta_BCD: jax.Array, own: Any) -> jax.Array:
    """Scale what a layer's attention or feed-forward adds to the stream, given what the layer has of its own."""
    if not own or "residual" not in own:
        return delta_BCD
    return (delta_BCD.astype(jnp.float32) * own["residual"]).astype(delta_BCD.dtype)


def carry(config: ModelConfig, params: Params | None, embedded_BTD: jax.Array, unshared: Any) -> Carried | None:
    """What the parts that are on give to every pass; None if they give nothing.

    Args:
        config: the model.
        params: linen's parameters of the trunk; None while they are made.
        embedded_BTD: embeddings.
        unshared: of ``collect_unshared``, leaves [R, L, ...].
    """
    if not config.parts.value_residual:
        return None
    if params is not None:
        return Carried(_first_values(config, params, embedded_BTD, unshared))
    shape = (*embedded_BTD.shape[:2], config.num_kv_heads * config.head_dim)
    return Carried(jnp.zeros(shape, embedded_BTD.dtype))


def _first_values(config: ModelConfig, params: Params, x_BTD: jax.Array, unshared: Any) -> jax.Array:
    """Values [B, T, X] of the model's first layer, projected once more rather than carried out of its loop."""
    has_middle = config.recursion.has_middle
    layer = params["first"] if has_middle else jax.tree.map(lambda leaf_LX: leaf_LX[0], params["block"])
    own_norm = "attention_norm" in layer
    scale_D = layer["attention_norm"]["scale"] if own_norm else unshared["attention_norm"]["scale"][0, 0]
    value_DKH = layer["attention"]["key_value"][:, 1].astype(x_BTD.dtype)
    values_BTKH = jnp.einsum("BTD,DKH->BTKH", rms_norm(x_BTD, scale_D, config.norm_epsilon), value_DKH)
    return values_BTKH.reshape(*x_BTD.shape[:2], -1)


def mix_values(fresh: KeyValue, carried: Carried | None, share: jax.Array | None) -> KeyValue:
    """Fresh keys and values [B, C, K, H], a share of the values taken from the first layer's."""
    if share is None or carried is None:
        return fresh
    keys, values = fresh
    first32, values32 = (v.astype(jnp.float32) for v in (carried.values_BCX.reshape(values.shape), values))
    return keys, (values32 + share * (first32 - values32)).astype(values.dtype)


def cap_logits(config: ModelConfig, logits_BTV: jax.Array) -> jax.Array:
    """Logits as the model means them, in float32 where they are capped."""
    return soft_cap(logits_BTV, config.parts.logit_softcap)

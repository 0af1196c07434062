"""The attention layer: grouped-query projections, rotary embedding, and the key/value strategies (B T S N K H)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mor_jax.array_types import KeyValue
from mor_jax.config import Kernels, ModelConfig, ResolvedPerf
from mor_jax.kernels.attention.backend import TPU_KERNELS, attend, resolve_backend
from mor_jax.kernels.choice import log_kernel
from mor_jax.kernels.rotary import Rotary, apply_rotary, rotary_of_rows, rotates_jointly, split_rotate
from mor_jax.kernels.tokens_innermost import project_down
from mor_jax.mesh.axes import axis_size, constrain
from mor_jax.model.layer_context import LayerContext
from mor_jax.model.layers import compute_weight, normal_init
from mor_jax.model.modern_parts import head_norms, mix_values
from mor_jax.model.relaxation import low_rank
from mor_jax.model.routing.select import merge_rows


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding and the three key/value strategies (paper section 2.2.2)."""

    config: ModelConfig
    perf: ResolvedPerf

    @nn.compact
    def __call__(
        self,
        x_BCD: jax.Array,
        context: LayerContext,
        cached: KeyValue | None,
        lora: Any = None,
        value_share: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Attend from [B, C, D]; also return keys and values [B, S, K, H] if the context keeps them.

        `lora` holds this recursion's low-rank updates, if any; `value_share` is of `parts.value_residual`.
        """
        config = self.config
        width, heads, kv_heads, head_dim = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        query = self.param("query", normal_init(config, "embed", "heads", "head_dim"), (width, heads, head_dim))
        key_value = self.param(
            "key_value", normal_init(config, "embed", None, "kv_heads", "head_dim"), (width, 2, kv_heads, head_dim)
        )
        output_init = normal_init(config, "heads", "head_dim", "embed")
        output = self.param("output", output_init, (heads, head_dim, width))
        norm_query, norm_key = head_norms(config)

        backend = resolve_backend(self.perf.attention_backend, config.dtype, head_dim)
        inside = backend in TPU_KERNELS  # rotates, so that cached keys are kept as they were projected

        def rotated(x_BCNH: jax.Array) -> jax.Array:
            return x_BCNH if inside else apply_rotary(x_BCNH, context.rotary)

        query, key_value, output = (w.astype(x_BCD.dtype) for w in (query, key_value, output))
        fused = self.perf.fused
        output = compute_weight(output) if fused else output
        projects_kv = cached is None or context.update is not None or context.fresh_BS is not None
        if projects_kv and _fuses_qkv(config, self.perf.fusion, lora):
            query_BCNH, fresh = project_qkv(x_BCD, query, key_value, context.rotary)
        else:
            query, key_value = map(compute_weight, (query, key_value)) if fused else (query, key_value)
            query_BCNH = _project(x_BCD, query, flat=inside)
            query_BCNH = query_BCNH + low_rank(config, lora, "query", x_BCD)
            query_BCNH = rotated(norm_query(query_BCNH))
            fresh = None
            if projects_kv:
                keys, values = self._key_value(x_BCD, key_value, lora, flat=inside)
                fresh = rotated(norm_key(keys)), values
        fresh = fresh if fresh is None else mix_values(fresh, context.first_values_BCX, value_share)
        query_BCNH = constrain(query_BCNH, "batch", "sequence", "heads", "head_dim")
        keys, values = _mixed(fresh, cached, context)
        named = ((query_BCNH, "query"), (keys, "key"), (values, "value"))
        query_BCNH, keys, values = (_named(x, name, flat=inside) for x, name in named)
        if context.observe is not None:
            turned = (query_BCNH, keys)
            if inside:
                rows = zip(turned, context.rotary_rows, strict=True)
                turned = tuple(apply_rotary(x, rotary_of_rows(of)) for x, of in rows)
            context.observe(*turned)
        with jax.named_scope("attend"):
            out_BCNH = attend(query_BCNH, keys, values, context.mask, backend, context.rotary_rows if inside else None)
        out_BCNH = constrain(out_BCNH, "batch", "sequence", "heads", "head_dim")
        if inside:  # named by the kernel, with what its gradient needs beside it
            out_BXC = jnp.swapaxes(out_BCNH.reshape(*x_BCD.shape[:2], -1), 1, 2)
            out_BCD = project_down(out_BXC, output.reshape(-1, width))
        else:
            out_BCNH = checkpoint_name(out_BCNH, "attention")
            out_BCD = jnp.einsum("BCNH,NHD->BCD", out_BCNH, output)
        out_BCD = out_BCD + low_rank(config, lora, "output", out_BCNH)
        return out_BCD, (keys, values) if context.keep_kv else None

    def _key_value(self, x_BCD: jax.Array, key_value: jax.Array, lora: Any, *, flat: bool) -> KeyValue:
        update: Any = low_rank(self.config, lora, "key_value", x_BCD)
        if flat:  # two products: halves of one would be copied out of it
            both = (_project(x_BCD, key_value[:, index], flat=True) for index in (0, 1))
            keys, values = (x if isinstance(update, float) else x + update[:, :, index] for index, x in enumerate(both))
            return keys, values
        fresh = jnp.einsum("BCD,DXKH->BCXKH", x_BCD, key_value) + update
        return fresh[:, :, 0], fresh[:, :, 1]


def _project(x_BCD: jax.Array, weight_DNH: jax.Array, *, flat: bool) -> jax.Array:
    """Project to heads [B, C, N, H]; ``flat`` has them as one axis, as the TPU kernels take them."""
    if not flat:
        return jnp.einsum("BCD,DNH->BCNH", x_BCD, weight_DNH)
    joint_BCX = jnp.einsum("BCD,DX->BCX", x_BCD, weight_DNH.reshape(weight_DNH.shape[0], -1))
    return joint_BCX.reshape(*x_BCD.shape[:2], *weight_DNH.shape[1:])


def _named(x_BCNH: jax.Array, name: str, *, flat: bool) -> jax.Array:
    """Name what rematerialisation may keep; ``flat`` keeps heads side by side, as the TPU kernels take them."""
    if not flat:
        return checkpoint_name(x_BCNH, name)
    return checkpoint_name(x_BCNH.reshape(*x_BCNH.shape[:2], -1), name).reshape(x_BCNH.shape)


def _fuses_qkv(config: ModelConfig, fusion: Kernels, lora: Any) -> bool:
    """Whether queries, keys and values are one product (queries alone gained nothing from the kernel).

    Not with low-rank updates or norms of the heads, which come before the rotation, and not where `tensor` splits the
    heads: queries and keys are split each by itself, so to join their weights would move them.
    """
    updated = lora is not None and ("query" in lora or "key_value" in lora)
    if config.parts.qk_norm and fusion != "xla":
        log_kernel("split and rotation", "XLA (parts.qk_norm=True normalises before the rotation)")
    unchanged = not updated and not config.parts.qk_norm
    return unchanged and axis_size("tensor") == 1 and rotates_jointly(fusion, config.head_dim)


def project_qkv(
    x_BCD: jax.Array, query_DNH: jax.Array, key_value_D2KH: jax.Array, rotary: Rotary
) -> tuple[jax.Array, KeyValue]:
    """Project to queries, keys and values by one product (fused QKV), and rotate by one kernel.

    The weights are joined at every use. Uses of a shared block join the same arrays, which XLA does once.

    Args:
        x_BCD: hidden states [B, C, D].
        query_DNH: weight [D, N, H] in their dtype.
        key_value_D2KH: weight [D, 2, K, H] in their dtype.
        rotary: cosine and sine, float32 [B or 1, C, 1, H/2].

    Returns:
        Rotated queries [B, C, N, H]; rotated keys, and values, [B, C, K, H] each.
    """
    width, heads, head_dim = query_DNH.shape
    joint_DMH = jnp.concatenate([query_DNH, key_value_D2KH.reshape(width, -1, head_dim)], axis=1)
    joint_DX = compute_weight(joint_DMH.reshape(width, -1))
    joint_BCX = jnp.einsum("BCD,DX->BCX", x_BCD, joint_DX)
    query_BCNH, keys, values = split_rotate(joint_BCX, rotary, heads, key_value_D2KH.shape[2])
    return query_BCNH, (keys, values)


def _mixed(fresh: KeyValue | None, cached: KeyValue | None, context: LayerContext) -> KeyValue:
    """The keys and values to attend to: fresh ones, cached ones, or cached ones with some rows replaced."""
    if fresh is None:
        assert cached is not None
        return cached
    if cached is None:
        return fresh
    keys, values = fresh
    if context.update is not None:
        fresh_and_cached = (constrain(a, "batch", None, "kv_heads", None) for a in (keys, values, *cached))
        keys, values, old_keys, old_values = fresh_and_cached
        return merge_rows(keys, old_keys, context.update), merge_rows(values, old_values, context.update)
    assert context.fresh_BS is not None
    fresh_BS11 = context.fresh_BS[:, :, None, None]
    return jnp.where(fresh_BS11, keys, cached[0]), jnp.where(fresh_BS11, values, cached[1])

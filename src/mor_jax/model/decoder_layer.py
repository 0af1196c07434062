"""The pre-norm Transformer layer and its rematerialisation."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig, ResolvedPerf
from mor_jax.mesh.axes import constrain
from mor_jax.model.attention import Attention
from mor_jax.model.layer_context import LayerContext
from mor_jax.model.layers import RMSNorm, SwiGLU
from mor_jax.model.relaxation import Unshared

_SAVED_NAMES = ("query", "key", "value", "attention", "gate_up")


class DecoderLayer(nn.Module):
    """Pre-norm Transformer layer, applied `repeats` times in place (sequence sharing)."""

    config: ModelConfig
    perf: ResolvedPerf
    repeats: int = 1

    @nn.compact
    def __call__(
        self, x_BCD: jax.Array, context: LayerContext, cached: KeyValue | None, unshared: Unshared | None
    ) -> tuple[jax.Array, KeyValue | None]:
        """Transform [B, C, D].

        `unshared` is what the recursions do not share: norm scales that replace the layer's own ([D], or [repeats, D]),
        low-rank updates, a recursion encoding, the share of ``PartsConfig.value_residual``.
        """
        fusion = self.perf.fusion
        attention_norm = RMSNorm(self.config, fusion, name="attention_norm")
        attention = Attention(self.config, self.perf, name="attention")
        ffn_norm, ffn = RMSNorm(self.config, fusion, name="ffn_norm"), SwiGLU(self.config, self.perf, name="ffn")
        shares = self.repeats > 1 and self.config.recursion.kv_strategy == "shared"
        kv = None
        for repeat in range(self.repeats):
            scales = dict.fromkeys(("attention_norm", "ffn_norm"))
            own = unshared or {}
            if self.repeats > 1:
                own = jax.tree.map(lambda a, repeat=repeat: a[repeat], own)
            scales |= {name: own[name]["scale"] for name in scales if name in own}
            if shares:
                first = repeat == 0
                context = dataclasses.replace(context, keep_kv=first)
                cached = None if first else kv
            lora = own.get("lora")
            x_BCD, normed_BCD = attention_norm(x_BCD, scale_D=scales["attention_norm"])
            delta_BCD, kept = attention(normed_BCD, context, cached, lora, own.get("value_share"))
            kv = kv if kept is None else kept
            x_BCD, normed_BCD = ffn_norm(x_BCD, delta_BCD, scales["ffn_norm"])
            x_BCD = constrain(x_BCD, "batch", "sequence", None)
            x_BCD = x_BCD + ffn(normed_BCD, lora)
            if "encoding" in own:
                x_BCD = x_BCD * own["encoding"][None, None, :].astype(x_BCD.dtype)
            x_BCD = constrain(x_BCD, "batch", "sequence", None)
        return x_BCD, None if shares else kv


def remat_layer(perf: ResolvedPerf, *, in_loop: bool) -> Any:
    """The layer, rematerialised as `perf` says."""
    policies = jax.checkpoint_policies
    policy = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*_SAVED_NAMES),
    }
    if perf.remat == "none":
        return DecoderLayer
    # a loop keeps the recomputation apart from what it repeats; layers outside one, or unrolled, need barriers
    loops = in_loop and perf.scan_unroll == 1
    return nn.remat(DecoderLayer, policy=policy[perf.remat], prevent_cse=not loops)

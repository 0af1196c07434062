"""The pre-norm Transformer layer and its rematerialisation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mor_jax.array_types import KeyValue
from mor_jax.config import ModelConfig, RematPolicy, ResolvedPerf
from mor_jax.kernels.norm import square_sums
from mor_jax.mesh.axes import constrain
from mor_jax.model.attention import Attention
from mor_jax.model.layer_context import LayerContext, Stream
from mor_jax.model.layers import RMSNorm, SwiGLU
from mor_jax.model.relaxation import Unshared

_PROJECTIONS = ("attention", "query", "key", "value")
_KEPT: Mapping[RematPolicy, tuple[str, ...]] = {
    "attention": ("attention",),
    "projections": _PROJECTIONS,
    "names": (*_PROJECTIONS, "gate_up"),
}
"""Named tensors that a policy keeps."""


class DecoderLayer(nn.Module):
    """Pre-norm Transformer layer, applied `repeats` times in place (sequence sharing)."""

    config: ModelConfig
    perf: ResolvedPerf
    repeats: int = 1

    @nn.compact
    def __call__(
        self, stream: Stream, context: LayerContext, cached: KeyValue | None, unshared: Unshared | None
    ) -> tuple[Stream, KeyValue | None]:
        """Transform the stream; its sums of squares go on if they came.

        `unshared` is what the recursions do not share: norm scales that replace the layer's own ([D], or [repeats, D]),
        low-rank updates, a recursion encoding, the share of ``PartsConfig.value_residual``.
        """
        fusion = self.perf.fusion
        attention_norm = RMSNorm(self.config, fusion, name="attention_norm")
        attention = Attention(self.config, self.perf, name="attention")
        ffn_norm, ffn = RMSNorm(self.config, fusion, name="ffn_norm"), SwiGLU(self.config, self.perf, name="ffn")
        shares = self.repeats > 1 and self.config.recursion.kv_strategy == "shared"
        x_BCD, squares_BC, kv = stream.x_BCD, stream.squares_BC, None
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
            x_BCD, normed_BCD = attention_norm(x_BCD, scale_D=scales["attention_norm"], squares_BC=squares_BC)
            delta_BCD, kept = attention(normed_BCD, context, cached, lora, own.get("value_share"))
            kv = kv if kept is None else kept
            x_BCD, normed_BCD = ffn_norm(x_BCD, delta_BCD, scales["ffn_norm"])
            x_BCD = constrain(x_BCD, "batch", "sequence", None)
            x_BCD = x_BCD + ffn(normed_BCD, lora)
            if "encoding" in own:
                x_BCD = x_BCD * own["encoding"][None, None, :].astype(x_BCD.dtype)
            x_BCD = constrain(x_BCD, "batch", "sequence", None)
            squares_BC = None if squares_BC is None else square_sums(x_BCD)
        return Stream(x_BCD, squares_BC), None if shares else kv


def remat_layer(perf: ResolvedPerf, *, loops: int) -> Any:
    """The layer, rematerialised as `perf` says, for a place in so many loops one after the other (0: outside any)."""
    if perf.remat == "none":
        return DecoderLayer
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if perf.remat == "dots" else None
    if perf.remat in _KEPT:
        policy = policies.save_only_these_names(*_KEPT[perf.remat])
    # A loop keeps the recomputation apart from what it repeats; layers outside one, or unrolled, need barriers. So do
    # several loops: XLA peels an iteration off each and would recompute all of them before the first gradient is there.
    alone = loops == 1 and perf.scan_unroll == 1
    return nn.remat(DecoderLayer, policy=policy, prevent_cse=not alone)

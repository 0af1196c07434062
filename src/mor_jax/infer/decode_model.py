"""A model ready to decode: weights in the compute dtype, one tree per layer, and the boundaries of its routers.

Decoding unrolls the layers, so that every product reads its weights where they lie; a scan over stacked weights would
copy each layer's slice first. Queries, keys and values are one matrix: decoding waits for launches and weights.
Letters: R recursions, L layers in the block, V vocabulary, D width, F feed-forward, N K heads, M = N + 2K, H head dim.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.errors import require
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.mesh import check_model, on_mesh, params_shardings, replicated
from mor_jax.model.parameters import compute_copy, head_matrix
from mor_jax.model.routing.boundaries import boundaries_of, boundary_refusal
from mor_jax.model.routing.router import RouterParams
from mor_jax.model.transformer import logical_axes


@struct.dataclass
class LayerWeights:
    """One layer, matrices as [outputs, inputs]."""

    query_key_value_XD: jax.Array
    """[M H, D]: N queries, K keys, K values; of several devices that share them, those of the first one come first."""
    output_DY: jax.Array
    """[D, N H]."""
    gate_up_XD: jax.Array
    """[2 F, D]: gate, up; of several devices likewise."""
    down_DF: jax.Array
    attention_norm_D: jax.Array | None = None
    """float32; None where the recursions have their own (``DecodeModel.norms``)."""
    ffn_norm_D: jax.Array | None = None
    head_norms_H: tuple[jax.Array, jax.Array] | None = None
    """float32 scales of queries and keys; None does not normalise them."""


@struct.dataclass
class DecodeModel:
    """Weights and configuration of a model that decodes."""

    config: ModelConfig = struct.field(pytree_node=False)
    embedding_VD: jax.Array
    head_VD: jax.Array | None
    """Output head; None is the embedding."""
    block: tuple[LayerWeights, ...]
    """Each layer of the shared block."""
    final_norm_D: jax.Array
    first: LayerWeights | None = None
    last: LayerWeights | None = None
    norms: Any = None
    """Norm scales [R, L, D], if the recursions do not share them."""
    value_share_L: jax.Array | None = None
    """Shares of ``parts.value_residual``."""
    router: RouterParams | None = None
    aux_router: RouterParams | None = None
    boundary_R: jax.Array | None = None
    """Expert-choice: raw score from which a token goes on, of ``boundaries_of``."""
    bias_R: jax.Array | None = None
    """Token-choice, loss-free balancing: added to the scores for choosing only."""
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    """Devices that share it over `tensor`; None is the default device."""
    known_tokens: int | None = struct.field(pytree_node=False, default=None)
    """Ids below it may be drawn: those from it on pad the vocabulary; None is all."""

    @property
    def shards(self) -> int:
        """Devices that share the heads, the feed-forward and the vocabulary."""
        return 1 if self.mesh is None else self.mesh.shape["tensor"]


def decoding_refusal(config: ModelConfig, running_R: jax.Array | None = None) -> str | None:
    """Say why a model cannot decode, or None if it can; ``running_R`` is ``Weights.boundaries_R``."""
    if config.recursion.kv_strategy == "shared_update":
        return (
            "recursion.kv_strategy='shared_update' cannot decode: each recursion attends to recursion 1's keys and "
            "values with the rows of its own tokens replaced, so a cache must hold both the shared and every "
            "recursion-wise copy, and gains nothing over 'recursion'"
        )
    relaxation = config.recursion.relaxation
    if relaxation.lora_rank or relaxation.encoding:
        return (
            f"recursion.relaxation (lora_rank={relaxation.lora_rank}, encoding={relaxation.encoding}) has no decoding "
            "yet: tokens at different recursions would need different weights in one pass"
        )
    return boundary_refusal(config, running_R)


def prepare_weights(
    config: ModelConfig,
    params: Params,
    *,
    router_bias_R: jax.Array | None = None,
    running_R: jax.Array | None = None,
    boundaries: Sequence[float] | None = None,
    mesh: Mesh | None = None,
    known_tokens: int | None = None,
) -> DecodeModel:
    """Make a decoding model from a parameter tree.

    Args:
        config: the model.
        params: parameter tree of ``init_params``.
        router_bias_R: float32 bias of loss-free balancing.
        running_R: float32 running boundaries of expert-choice (``Weights.boundaries_R``).
        boundaries: raw-score boundary of every recursion; None takes the model's own (``boundaries_of``).
        mesh: devices that share the model over `tensor`, its other axes of size 1; None is the default device. Weights
            are placed as shards, and never lie whole on one of them.
        known_tokens: the tokenizer's vocabulary; ids beyond it are never drawn.

    Returns:
        The model, in ``config.dtype`` but for norms and routers.

    Raises:
        UserError: what ``decoding_refusal`` says, a wrong number of boundaries or a model without, or a mesh that does
            not divide the model.
    """
    if boundaries is not None:
        kind = config.routing.kind
        require(kind == "expert", f"boundaries={tuple(boundaries)} belong to expert-choice, not routing.kind={kind!r}")
        routing = dataclasses.replace(config.routing, boundaries=tuple(float(b) for b in boundaries))
        config = dataclasses.replace(config, routing=routing)
    refusal = decoding_refusal(config, running_R)
    require(refusal is None, refusal or "")
    whole: Any = jnp.asarray
    if mesh is not None:
        check_model(config, mesh)
        require(mesh.size == mesh.shape["tensor"], f"an engine's mesh has no axis but tensor, not {dict(mesh.shape)}")
        params = jax.device_put(dict(params), params_shardings(mesh, logical_axes(config)))
        whole = functools.partial(jax.device_put, device=replicated(mesh))
    shards = 1 if mesh is None else mesh.shape["tensor"]
    with on_mesh(mesh):
        weights = jax.jit(_decode_weights, static_argnums=(0, 1))(config, shards, params)
    routing = config.routing
    return DecodeModel(
        config=config,
        embedding_VD=weights["embedding"]["embedding"],
        head_VD=weights.get("head"),
        block=weights["block"],
        final_norm_D=weights["final_norm"]["scale"],
        first=weights.get("first"),
        last=weights.get("last"),
        norms=weights.get("block_norms"),
        value_share_L=weights["value_residual"]["scale"][0] if config.parts.value_residual else None,
        router=weights.get("router"),
        aux_router=weights.get("aux_router"),
        boundary_R=whole(boundaries_of(config, running_R)) if routing.kind == "expert" else None,
        bias_R=whole(router_bias_R) if routing.is_loss_free and router_bias_R is not None else None,
        mesh=mesh,
        known_tokens=None if known_tokens is None or known_tokens >= config.vocab_size else known_tokens,
    )


def _decode_weights(config: ModelConfig, shards: int, params: Params) -> dict[str, Any]:
    """Weights in the compute dtype, the block as a tuple of layers, the head as [V, D] if it is no embedding."""
    weights = dict(compute_copy(config, params))
    layers: dict[str, Any] = {n: _layer_weights(weights[n], shards) for n in ("first", "last") if n in weights}
    block = (jax.tree.map(lambda leaf_LX, i=i: leaf_LX[i], weights["block"]) for i in range(config.block_depth))
    layers["block"] = tuple(_layer_weights(layer, shards) for layer in block)
    head = {} if config.tie_embeddings else {"head": constrain(head_matrix(config, weights), "vocab", "embed")}
    return weights | layers | head


def _layer_weights(layer: Any, shards: int) -> LayerWeights:
    attention, ffn = layer["attention"], layer["ffn"]
    width, _, head_dim = attention["query"].shape
    keys, values = attention["key_value"][:, 0], attention["key_value"][:, 1]
    parts = [heads.reshape(width, shards, -1, head_dim) for heads in (attention["query"], keys, values)]
    gate_up = ffn["gate_up"].reshape(width, 2, shards, -1)
    scale = lambda name: layer[name]["scale"] if name in layer else None  # noqa: E731
    names = ("query_norm", "key_norm")
    head_norms = tuple(attention[name]["scale"] for name in names) if names[0] in attention else None
    return LayerWeights(
        query_key_value_XD=constrain(jnp.concatenate(parts, axis=2).reshape(width, -1).T, "heads", "embed"),
        output_DY=constrain(attention["output"].reshape(-1, width).T, "embed", "heads"),
        gate_up_XD=constrain(jnp.moveaxis(gate_up, 2, 1).reshape(width, -1).T, "ffn", "embed"),
        down_DF=constrain(ffn["down"].T, "embed", "ffn"),
        attention_norm_D=scale("attention_norm"),
        ffn_norm_D=scale("ffn_norm"),
        head_norms_H=head_norms,
    )

"""The parameter tree: linen's names and the public ones, the head, and the copy that is computed with."""

from typing import Any

import jax

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig


def to_tree(variables: Any) -> dict[str, Any]:
    """Turn linen's flat root names into the public tree (embedding and head get a level of their own)."""
    params = dict(variables["params"])
    params["embedding"] = {"embedding": params["embedding"]}
    if "head" in params:
        params["head"] = {"kernel": params["head"]}
    return params


def from_tree(params: Params) -> dict[str, Any]:
    """Return linen's variables of a public tree."""
    flat = dict(params)
    flat["embedding"] = params["embedding"]["embedding"]
    if "head" in params:
        flat["head"] = params["head"]["kernel"]
    return {"params": flat}


def head_matrix(config: ModelConfig, params: Params) -> jax.Array:
    """Output head [V, D]: the embedding if tied, otherwise the transposed head kernel."""
    return params["embedding"]["embedding"] if config.tie_embeddings else params["head"]["kernel"].T


def compute_copy(config: ModelConfig, params: Params) -> Params:
    """Weights in the compute dtype, made once; norms and routers stay float32."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        names = {entry.key for entry in path}
        keeps = names & {"scale", "router", "aux_router"}
        return leaf if keeps else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)

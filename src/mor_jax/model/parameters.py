"""The parameter tree: linen's names and the public ones, the head, the copy that is computed with, and ``Weights``."""

from typing import Any

import jax
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.mesh.devices import target_platform

ROUTER_STATE = "router_state"
"""Entry of imported trees beside the trained ones, for what no gradient reaches: the loss-free bias of token-choice
(`bias`, table 14) and the running boundaries of expert-choice (`boundaries`)."""


@struct.dataclass
class Weights:
    """A model that can be run; a pytree of its arrays, the configuration static."""

    config: ModelConfig = struct.field(pytree_node=False)
    params: Params
    """Parameter tree of ``transformer.init_params``."""
    router_bias_R: jax.Array | None = None
    """float32 [R]: bias of loss-free balancing; read by token-choice that is balanced so, None is zeros."""
    boundaries_R: jax.Array | None = None
    """float32 [R]: running boundaries of expert-choice whose own router selects, NaN where there is none yet."""
    max_depth: jax.Array | None = None
    """int32 scalar: passes that a token of token-choice may take at most; None is all. See ``evaluate.depth_cap``."""

    @classmethod
    def of_tree(cls, config: ModelConfig, tree: Params) -> "Weights":
        """Make them from an imported tree, which may hold the router's state (see ``split_router_state``)."""
        return cls(config, *split_router_state(tree))


def split_router_state(tree: Params) -> tuple[dict[str, Any], jax.Array | None, jax.Array | None]:
    """Take the router's state out of an imported parameter tree.

    Args:
        tree: parameters, perhaps with the extra entries ``router_state/bias`` or ``/boundaries`` (float32 [R]).

    Returns:
        (the tree of trained parameters, the loss-free bias or None, the running boundaries or None).
    """
    trained = {name: value for name, value in tree.items() if name != ROUTER_STATE}
    state = tree.get(ROUTER_STATE, {})
    return trained, state.get("bias"), state.get("boundaries")


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


def fill_tiles(params: Params) -> Params:
    """Lay the block's gate and up [L, D, 2, F] out one after the other, where the program is for a TPU.

    As they are stored, the loop over layers would cut and write tiles of 2 x 128, at a third of the memory's speed.
    """
    if target_platform() != "tpu" or "block" not in params:
        return params
    ffn = params["block"]["ffn"]
    return {**params, "block": {**params["block"], "ffn": {**ffn, "gate_up": _parts_first(ffn["gate_up"])}}}


@jax.custom_vjp
def _parts_first(weight_LDXF: jax.Array) -> jax.Array:
    return with_layout_constraint(weight_LDXF, Layout(major_to_minor=(0, 2, 1, 3)))


def _parts_first_backward(_: None, grad_LDXF: jax.Array) -> tuple[jax.Array]:
    """Bring the gradient back to how the weight is stored: else weight and both moments would be copied."""
    grad_LDXF = jax.lax.optimization_barrier(_parts_first(grad_LDXF))
    return (with_layout_constraint(grad_LDXF, Layout(major_to_minor=(0, 1, 2, 3))),)


_parts_first.defvjp(lambda weight_LDXF: (_parts_first(weight_LDXF), None), _parts_first_backward)

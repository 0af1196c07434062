"""Parameters of a model's first passes, with or without its routers: what a stage of growth trains, and a cap keeps.

A part (``config.fewer_passes``) reads of the whole model's tree what its own tree has: leaves stacked over recursions
are cut to its passes, routers are left out if it has none. The rest of the tree is what the whole model adds.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.model.transformer import logical_axes


def cut_params(whole: ModelConfig, part: ModelConfig, params: Params) -> Params:
    """Return what a part computes with.

    Args:
        whole: the model.
        part: its first passes.
        params: parameter tree of ``whole``.
    """
    if part == whole:
        return params
    count, axes = part.recursion.num_recursions, logical_axes(part)
    kept = {name: params[name] for name in axes}
    return jax.tree.map(lambda names, leaf: leaf[:count] if _is_stacked(names) else leaf, axes, kept, is_leaf=_is_axes)


def zero_unused(whole: ModelConfig, part: ModelConfig, tree: Any) -> Any:
    """Return a tree such as the whole model's parameters with zeros wherever a part computes with nothing of it."""
    if part == whole:
        return tree
    count, axes = part.recursion.num_recursions, logical_axes(part)

    def clear(names: Any, leaf: jax.Array) -> jax.Array:
        return leaf.at[count:].set(0) if _is_stacked(names) else leaf

    kept = {name: jax.tree.map(clear, axes[name], tree[name], is_leaf=_is_axes) for name in axes}
    return {name: kept[name] if name in kept else jax.tree.map(jnp.zeros_like, tree[name]) for name in tree}


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _is_stacked(names: tuple[str | None, ...]) -> bool:
    return bool(names) and names[0] == "recursions"

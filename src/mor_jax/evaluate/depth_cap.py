"""A cap on the passes that a token may take at evaluation: the test-time scaling curve (paper section 4.3).

Nothing of the model's code knows of it: a capped model is a configuration and parameters that say so.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.errors import require
from mor_jax.model.transformer import logical_axes


def cap_depth(
    model: ModelConfig, params: Params, router_bias_R: jax.Array | None, max_depth: int
) -> tuple[ModelConfig, Params, jax.Array | None]:
    """Return a model whose tokens take at most ``max_depth`` passes through the shared block.

    Without a router and with expert-choice the recursions beyond the cap are cut off: the kept ones decide as before,
    and nothing is computed for the others. A token of token-choice takes the best-scored depth among those allowed,
    with its own gate.

    Args:
        model: the model.
        params: its parameter tree.
        router_bias_R: loss-free bias of token-choice, float32 [R], or None.
        max_depth: the cap, 1..N_r.

    Returns:
        (model, parameters, bias) to evaluate with.

    Raises:
        UserError: a cap outside 1..N_r, or a model that repeats layers in place.
    """
    recursion, routing = model.recursion, model.routing
    count = recursion.num_recursions
    require(1 <= max_depth <= count, f"max_depth={max_depth} is outside 1..num_recursions={count}")
    whole = f"max_depth={max_depth} counts passes of a whole block, which sharing={recursion.sharing!r} does not have"
    require(not recursion.is_sequence, whole)
    if max_depth == count:
        return model, params, router_bias_R
    if routing.kind == "token":
        bias_R = jnp.zeros(count) if router_bias_R is None or routing.balancing != "loss_free" else router_bias_R
        allowed_R = jnp.arange(count) < max_depth
        routing = dataclasses.replace(routing, balancing="loss_free")
        return dataclasses.replace(model, routing=routing), params, jnp.where(allowed_R, bias_R, -jnp.inf)
    capped = dataclasses.replace(recursion, num_recursions=max_depth, base_depth=model.block_depth)
    routing = dataclasses.replace(
        routing,
        capacities=model.capacities[:max_depth] if routing.kind == "expert" else routing.capacities,
        boundaries=routing.boundaries and routing.boundaries[:max_depth],
    )
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    cut = lambda axes, leaf: leaf[:max_depth] if axes and axes[0] == "recursions" else leaf  # noqa: E731
    kept: dict[str, Any] = jax.tree.map(cut, logical_axes(model), dict(params), is_leaf=is_axes)
    return dataclasses.replace(model, recursion=capped, routing=routing), kept, router_bias_R

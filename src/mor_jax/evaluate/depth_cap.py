"""A cap on the passes that a token may take at evaluation: the test-time scaling curve (paper section 4.3).

A capped model is ``Weights`` that say so.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.errors import require
from mor_jax.model.parameters import Weights
from mor_jax.model.transformer import logical_axes


def cap_depth(weights: Weights, max_depth: int) -> Weights:
    """Return a model whose tokens take at most ``max_depth`` passes through the shared block.

    Without a router and with expert-choice the recursions beyond the cap are cut off: the kept ones decide as before,
    and nothing is computed for the others. A token of token-choice takes the best-scored depth among those allowed,
    with its own gate (``routing.decide.best_depth``). The engine's ``max_depth`` means the same.

    Args:
        weights: the model.
        max_depth: the cap, 1..N_r.

    Returns:
        What to evaluate with.

    Raises:
        UserError: a cap outside 1..N_r, or a model that repeats layers in place.
    """
    model = weights.config
    recursion, routing = model.recursion, model.routing
    count = recursion.num_recursions
    require(1 <= max_depth <= count, f"max_depth={max_depth} is outside 1..num_recursions={count}")
    whole = f"max_depth={max_depth} counts passes of a whole block, which sharing={recursion.sharing!r} does not have"
    require(not recursion.is_sequence, whole)
    if max_depth == count:
        return weights
    if routing.kind == "token":
        return dataclasses.replace(weights, max_depth=jnp.asarray(max_depth, jnp.int32))
    capped = dataclasses.replace(recursion, num_recursions=max_depth, base_depth=model.block_depth)
    routing = dataclasses.replace(
        routing,
        capacities=model.capacities[:max_depth] if routing.kind == "expert" else routing.capacities,
        boundaries=routing.boundaries and routing.boundaries[:max_depth],
    )
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    cut = lambda axes, leaf: leaf[:max_depth] if axes and axes[0] == "recursions" else leaf  # noqa: E731
    kept: dict[str, Any] = jax.tree.map(cut, logical_axes(model), dict(weights.params), is_leaf=is_axes)
    running_R = None if weights.boundaries_R is None else weights.boundaries_R[:max_depth]
    capped = dataclasses.replace(model, recursion=capped, routing=routing)
    return dataclasses.replace(weights, config=capped, params=kept, boundaries_R=running_R)

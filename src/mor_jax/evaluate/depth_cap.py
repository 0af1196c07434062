"""A cap on the passes that a token may take at evaluation: the test-time scaling curve (paper section 4.3).

A capped model is ``Weights`` that say so.
"""

import dataclasses

import jax.numpy as jnp

from mor_jax.config import fewer_passes
from mor_jax.errors import require
from mor_jax.model.cut import cut_params
from mor_jax.model.parameters import Weights


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
    capped = fewer_passes(model, max_depth)
    running_R = None if weights.boundaries_R is None else weights.boundaries_R[:max_depth]
    kept = cut_params(model, capped, weights.params)
    return dataclasses.replace(weights, config=capped, params=kept, boundaries_R=running_R)

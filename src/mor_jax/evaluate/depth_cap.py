"""A cap on the passes that a token may take at evaluation: the test-time scaling curve (paper section 4.3).

Nothing of the model's code knows of it: a capped model is ``Weights`` that say so.
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
    with its own gate.

    Args:
        weights: the model.
        max_depth: the cap, 1..N_r.

    Returns:
        What to evaluate with.

    Raises:
        UserError: a cap outside 1..N_r, or a model that repeats layers in place.
    """
    model, bias_R = weights.config, weights.router_bias_R
    recursion, routing = model.recursion, model.routing
    count = recursion.num_recursions
    require(1 <= max_depth <= count, f"max_depth={max_depth} is outside 1..num_recursions={count}")
    whole = f"max_depth={max_depth} counts passes of a whole block, which sharing={recursion.sharing!r} does not have"
    require(not recursion.is_sequence, whole)
    if max_depth == count:
        return weights
    if routing.kind == "token":
        bias_R = bias_R if routing.is_loss_free and bias_R is not None else jnp.zeros(count)
        allowed_R = jnp.arange(count) < max_depth
        routing = dataclasses.replace(routing, balancing="loss_free")
        capped = dataclasses.replace(model, routing=routing)
        return Weights(capped, weights.params, jnp.where(allowed_R, bias_R, -jnp.inf))
    capped = fewer_passes(model, max_depth)
    return Weights(capped, cut_params(model, capped, weights.params), bias_R)

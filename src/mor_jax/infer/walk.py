"""A token's way through the recursions under causal routing, as decoding takes it (paper equations 2.1 and 2.2).

The same decisions as mode `threshold` of the training code, taken one pass at a time, for rows that may stand at
different recursions. Letters: B rows, T tokens, D width, R recursions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.infer.decode_model import DecodeModel
from mor_jax.model.routing import router as routing
from mor_jax.model.routing.decide import best_depth


@struct.dataclass
class Walk:
    """Tokens between two passes."""

    x_BTD: jax.Array
    """Residual state that enters the next pass; once a token no longer goes on, its final state."""
    origin_BTD: jax.Array | None
    """The state before the first pass, for token-choice."""
    gate_BTR: jax.Array | None
    """float32 gates: expert-choice that of the next pass [B, T, 1], token-choice those of every depth."""
    recursion_BT: jax.Array
    """int32: the next pass, from 0."""
    limit_BT: jax.Array
    """int32: passes that the token may take at most; token-choice: those that it takes."""
    depth_BT: jax.Array
    """int32: passes completed."""
    going_BT: jax.Array
    """bool: whether the next pass computes the token."""
    applies_BT: jax.Array
    """bool: whether that pass changes it. Shared keys and values: recursion 1 computes also tokens that it leaves."""


def start_walk(model: DecodeModel, x_BTD: jax.Array, max_depth_BT: jax.Array) -> Walk:
    """Begin before the first pass.

    Args:
        model: the model.
        x_BTD: states before the block.
        max_depth_BT: int32 budget of passes per token, at least 1.
    """
    shape, kind = x_BTD.shape[:2], model.config.routing.kind
    gates_BTR, limit_BT = None, max_depth_BT
    if kind == "token":
        assert model.router is not None
        raw_BTR = routing.raw_scores(model.router, x_BTD, model.config.routing.temperature)
        gates_BTR = routing.score(model.config, raw_BTR)
        limit_BT = best_depth(gates_BTR, model.bias_R, max_depth_BT)
    walk = Walk(
        x_BTD=x_BTD,
        origin_BTD=x_BTD if kind == "token" else None,
        gate_BTR=gates_BTR,
        recursion_BT=jnp.zeros(shape, jnp.int32),
        limit_BT=limit_BT,
        depth_BT=jnp.zeros(shape, jnp.int32),
        going_BT=jnp.ones(shape, bool),
        applies_BT=jnp.ones(shape, bool),
    )
    return _decide(model, walk) if kind == "expert" else walk


def advance(model: DecodeModel, walk: Walk, out_BTD: jax.Array) -> Walk:
    """Take the block's output of the tokens that were going, and decide who goes on."""
    config, going_BT = model.config, walk.going_BT
    completed_BT = going_BT & walk.applies_BT
    next_BT = walk.recursion_BT + 1
    if config.routing.kind == "expert":
        assert walk.gate_BTR is not None
        delta_BTD = routing.gated(config, walk.gate_BTR[:, :, 0], out_BTD, walk.x_BTD)
        x_BTD = jnp.where(completed_BT[:, :, None], walk.x_BTD + delta_BTD, walk.x_BTD)
    elif config.routing.kind == "token":
        x_BTD = _token_exit(model, walk, out_BTD, leaves_BT=going_BT & (next_BT >= walk.limit_BT))
    else:
        x_BTD = jnp.where(going_BT[:, :, None], out_BTD, walk.x_BTD)
    walk = dataclasses.replace(
        walk,
        x_BTD=x_BTD,
        depth_BT=walk.depth_BT + completed_BT,
        recursion_BT=walk.recursion_BT + going_BT,
        going_BT=completed_BT & (next_BT < walk.limit_BT),
    )
    return _decide(model, walk) if config.routing.kind == "expert" else walk


@jax.named_scope("routing")
def _token_exit(model: DecodeModel, walk: Walk, out_BTD: jax.Array, leaves_BT: jax.Array) -> jax.Array:
    assert walk.gate_BTR is not None
    assert walk.origin_BTD is not None
    gate_BT1 = jnp.take_along_axis(walk.gate_BTR, walk.recursion_BT[:, :, None], axis=2, mode="clip")
    delta_BTD = routing.gated(model.config, gate_BT1[:, :, 0], out_BTD, walk.origin_BTD)
    x_BTD = jnp.where(walk.going_BT[:, :, None], out_BTD, walk.x_BTD)
    return jnp.where(leaves_BT[:, :, None], walk.origin_BTD + delta_BTD, x_BTD)


def _boundary_scores(model: DecodeModel, walk: Walk) -> jax.Array:
    """float32 [B, T]: what expert-choice compares with the boundary before the next pass."""
    if model.aux_router is not None:
        return routing.raw_scores_at(model.aux_router, walk.x_BTD, walk.recursion_BT)
    assert model.router is not None
    return routing.raw_scores_at(model.router, walk.x_BTD, walk.recursion_BT, model.config.routing.temperature)


@jax.named_scope("routing")
def _decide(model: DecodeModel, walk: Walk) -> Walk:
    """Expert-choice by threshold: compare the score before the next pass with its boundary."""
    config = model.config
    assert model.router is not None
    assert model.boundary_R is not None
    raw_BT = routing.raw_scores_at(model.router, walk.x_BTD, walk.recursion_BT, config.routing.temperature)
    compared_BT = _boundary_scores(model, walk)
    boundary_BT = model.boundary_R.at[walk.recursion_BT].get(mode="clip")
    applies_BT = walk.going_BT & (compared_BT >= boundary_BT) & (walk.recursion_BT < walk.limit_BT)
    # shared keys and values come from recursion 1 of every token
    supplies_BT = walk.going_BT & (walk.recursion_BT == 0) & (config.recursion.kv_strategy == "shared")
    return dataclasses.replace(
        walk,
        gate_BTR=routing.score(config, raw_BT)[:, :, None],
        going_BT=applies_BT | supplies_BT,
        applies_BT=applies_BT,
    )

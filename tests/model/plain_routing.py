"""Expert-choice and token-choice written down a second time, for `plain_reference` (paper equations 2.1 and 2.2)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from plain_reference import PlainBlock, Rows

from mor_jax.config import ModelConfig


def _raw(router: Any, x_BTD: jax.Array) -> jax.Array:
    if "kernel" in router:
        return x_BTD @ router["kernel"]
    h = x_BTD @ router["hidden"]
    return (h * 0.5 * (1 + jax.scipy.special.erf(h / math.sqrt(2)))) @ router["output"]


def _gate(config: ModelConfig, raw: jax.Array) -> jax.Array:
    powers = jnp.exp(raw)
    squashed = {
        "sigmoid": lambda: powers / (1 + powers),
        "tanh": lambda: (powers**2 - 1) / (powers**2 + 1),
        "softmax": lambda: powers / powers.sum(-1, keepdims=True),
        "none": lambda: raw,
    }
    return config.routing.alpha * (raw if config.routing.random else squashed[config.routing.score]())


def _joined(config: ModelConfig, x: jax.Array, gate_BT: jax.Array, out: jax.Array) -> jax.Array:
    change = out - x if config.routing.residual == "plain" else out
    return x + (change if config.routing.gating == "additive" else gate_BT[:, :, None] * change)


def _mean(values: jax.Array, over: jax.Array) -> jax.Array:
    return jnp.where(over, values, 0.0).sum() / over.sum()


def _rank(scores_BT: jax.Array, counted_BT: jax.Array, active_BT: jax.Array) -> jax.Array:
    """How many active tokens of the row come before a token: real ones first, then higher scores, then earlier ones."""
    order = jnp.arange(scores_BT.shape[1])
    mine, theirs = scores_BT[:, :, None], scores_BT[:, None, :]
    real, others = counted_BT[:, :, None], counted_BT[:, None, :]
    earlier = (order[None, :] < order[:, None])[None]
    tied = ~real & ~others | (mine == theirs) & (real == others)
    before = (others & ~real) | (others & real & (theirs > mine)) | (tied & earlier)
    return jnp.sum(before & active_BT[:, None, :], axis=2)


def _agreement_loss(raw_BT: jax.Array, chosen_BT: jax.Array, over_BT: jax.Array) -> jax.Array:
    """Cross-entropy of a coin with log-odds ``raw`` against what was chosen."""
    signed = jnp.where(chosen_BT, raw_BT, -raw_BT)
    return _mean(jnp.log(1 + jnp.exp(-signed)), over_BT)


def expert(config: ModelConfig, params: Any, block: PlainBlock, x_BTD: jax.Array, rows: Rows, choose: Any):
    """Expert-choice. ``choose(r, raw_BT, judged_BT, rank)`` says which active tokens go on.

    ``raw_BT`` are the router's scores, ``judged_BT`` those that a boundary judges (an auxiliary router's, if there is
    one), ``rank(scores_BT)`` numbers the active tokens from the best on.
    """
    routing = config.routing
    active_BT = jnp.ones(rows.tokens_BT.shape, bool)
    depth_BT = jnp.zeros(rows.tokens_BT.shape, jnp.int32)
    losses = {"sampling": jnp.zeros(()), "aux_router": jnp.zeros(()), "router_z": jnp.zeros(())}
    for r in range(config.recursion.num_recursions):
        raw_BT = _raw(jax.tree.map(lambda leaf, r=r: leaf[r], params["router"]), x_BTD / routing.temperature)[..., 0]
        raw_BT = choose.noise_RBT[r] if routing.random else raw_BT
        judged_BT, name = raw_BT, "sampling"
        if routing.sampling == "aux_router":
            aux = jax.tree.map(lambda leaf, r=r: leaf[r], params["aux_router"])
            judged_BT, name = _raw(aux, jax.lax.stop_gradient(x_BTD))[..., 0], "aux_router"
        rank = functools.partial(_rank, counted_BT=rows.counted_BT, active_BT=active_BT)
        selected_BT = active_BT & choose(r, raw_BT, judged_BT, rank)
        counted_BT = active_BT & rows.counted_BT
        if routing.sampling != "none" and not routing.random:
            losses[name] += _agreement_loss(judged_BT, selected_BT, counted_BT)
        losses["router_z"] += _mean(raw_BT**2, counted_BT)
        joined_BTD = _joined(config, x_BTD, _gate(config, raw_BT), block(r, x_BTD, selected_BT))
        x_BTD = jnp.where(selected_BT[:, :, None], joined_BTD, x_BTD)
        depth_BT += selected_BT
        active_BT = selected_BT
    return x_BTD, depth_BT, losses


class TopK:
    """The ``counts[r]`` best go on: by score, which a random router draws."""

    def __init__(self, counts: tuple[int, ...], noise_RBT: jax.Array | None = None) -> None:
        self.counts, self.noise_RBT = counts, noise_RBT

    def __call__(self, r: int, raw_BT: jax.Array, judged_BT: jax.Array, rank: Any) -> jax.Array:
        return rank(raw_BT) < self.counts[r]


def threshold(capacities: tuple[float, ...], boundaries: tuple[float, ...]) -> Any:
    """Those at or above the boundary go on; capacity 1 lets all."""
    return lambda r, raw_BT, judged_BT, rank: (judged_BT >= boundaries[r]) | (capacities[r] == 1)


def token(config: ModelConfig, params: Any, block: PlainBlock, x_BTD: jax.Array, rows: Rows, choose: Any):
    """Token-choice. ``choose[r]`` are the seats of a row at recursion r, None for all."""
    routing, recursions = config.routing, config.recursion.num_recursions
    raw_BTR = _raw(params["router"], x_BTD / routing.temperature)
    gate_BTR = _gate(config, raw_BTR)
    asked_BT = jnp.where(rows.counted_BT, 1 + jnp.argmax(gate_BTR, axis=-1), 1)
    taken_BT = jnp.ones(rows.tokens_BT.shape, bool)
    state_BTD, left_BTD = x_BTD, x_BTD
    depth_BT = jnp.zeros(rows.tokens_BT.shape, jnp.int32)
    for r in range(recursions):
        taken_BT = taken_BT & (asked_BT > r)
        if choose is not None:
            taken_BT = taken_BT & (jnp.cumsum(taken_BT, axis=1) <= choose[r])
        state_BTD = jnp.where(taken_BT[:, :, None], block(r, state_BTD, taken_BT), state_BTD)
        # overwritten until the token's last pass
        joined_BTD = _joined(config, x_BTD, gate_BTR[:, :, r], state_BTD)
        left_BTD = jnp.where(taken_BT[:, :, None], joined_BTD, left_BTD)
        depth_BT += taken_BT
    losses = {"router_z": _mean(jnp.log(jnp.exp(raw_BTR).sum(-1)) ** 2, rows.counted_BT)}
    if routing.balancing == "loss":
        losses["balancing"] = jnp.zeros(())
        for i in range(recursions):
            share = _mean((asked_BT == i + 1) * 1.0, rows.counted_BT)
            losses["balancing"] += recursions * share * _mean(gate_BTR[:, :, i], rows.counted_BT)
    return left_BTD, depth_BT, losses

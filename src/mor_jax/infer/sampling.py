"""Choosing the next token: greedy, or at random by temperature, top-k and top-p (letters: E rows, V vocabulary)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.errors import require
from mor_jax.mesh.axes import constrain


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (after temperature and top-k); 0 is the most
    likely token, as temperature 0 is."""
    seed: int = 0
    """With the position, all that the draw depends on: the same whatever else is being generated."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 100, f"temperature={self.temperature} is outside [0, 100]")
        require(0 <= self.top_k < 2**31, f"top_k={self.top_k} must be a count, or 0 for all")
        require(0 <= self.top_p <= 1, f"top_p={self.top_p} is outside [0, 1]")
        require(0 <= self.seed < 2**32, f"seed={self.seed} is outside [0, 2^32)")
        if self.top_p == 0:  # so that an engine without cuts serves it
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", 1.0)


@struct.dataclass
class SamplingRows:
    """``Sampling`` of many rows, as arrays [E] of the device or the host."""

    temperature_E: Any
    top_k_E: Any
    top_p_E: Any
    seed_E: Any

    @property
    def draws_E(self) -> jax.Array:
        """bool: rows that draw at random."""
        return self.temperature_E > 0

    @property
    def cuts_E(self) -> jax.Array:
        """bool: rows that draw from a part of the vocabulary."""
        return self.draws_E & ((self.top_k_E > 0) | (self.top_p_E < 1))


def sample(
    logits_EV: jax.Array,
    rows: SamplingRows,
    position_E: jax.Array,
    *,
    known_tokens: int | None = None,
    cuts: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Choose a token per row.

    Args:
        logits_EV: float32.
        rows: how.
        position_E: int32 position of the token that the logits follow.
        known_tokens: ids from here on are never chosen; None is no limit.
        cuts: whether rows may cut the vocabulary. If none may, there is no branch, for which a GPU would wait for the
            host: noise is always made.

    Returns:
        int32 tokens, and their float32 log-probability under the model (before temperature and cuts).
    """
    all_EV = logits_EV
    if known_tokens is not None:
        logits_EV = jnp.where(jnp.arange(logits_EV.shape[1])[None, :] < known_tokens, logits_EV, -jnp.inf)
    greedy_E, draws_E = jnp.argmax(logits_EV, axis=-1).astype(jnp.int32), rows.draws_E
    if cuts:  # noise is made only if somebody draws, and the vocabulary is sorted only if somebody cuts it
        level = jnp.any(draws_E).astype(jnp.int32) + jnp.any(rows.cuts_E)
        drawn_E = jax.lax.switch(level, (lambda *_: greedy_E, _draw, _draw_cut), logits_EV, rows, position_E)
    else:
        drawn_E = _draw(logits_EV, rows, position_E)
    token_E = jnp.where(draws_E, drawn_E, greedy_E)
    picked_E1 = jnp.take_along_axis(all_EV, token_E[:, None], axis=-1)
    return token_E, picked_E1[:, 0] - jax.nn.logsumexp(all_EV, axis=-1)


def _draw(logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array) -> jax.Array:
    """Gumbel-max: the largest of logit and noise is a draw from the softmax."""
    noise_EV = _noise(rows, position_E, logits_EV.shape[1])
    return jnp.argmax(_scaled(logits_EV, rows) + noise_EV, axis=-1).astype(jnp.int32)


def _draw_cut(logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array) -> jax.Array:
    """The same among the tokens that top-k and top-p leave; noise belongs to a token, not to its rank."""
    scaled_EV = constrain(_scaled(logits_EV, rows))  # whole on every device: sorted pieces would be moved more often
    order_EV = jnp.argsort(-scaled_EV, axis=-1)
    sorted_EV = jnp.take_along_axis(scaled_EV, order_EV, axis=-1)
    rank_1V = jnp.arange(logits_EV.shape[1])[None, :]
    count_E1 = jnp.where(rows.top_k_E > 0, rows.top_k_E, logits_EV.shape[1])[:, None]
    sorted_EV = jnp.where(rank_1V < count_E1, sorted_EV, -jnp.inf)
    probability_EV = jax.nn.softmax(sorted_EV, axis=-1)
    before_EV = jnp.cumsum(probability_EV, axis=-1) - probability_EV
    kept_EV = (rank_1V < count_E1) & ((before_EV < rows.top_p_E[:, None]) | (rank_1V == 0))
    noise_EV = jnp.take_along_axis(_noise(rows, position_E, logits_EV.shape[1]), order_EV, axis=-1)
    chosen_E1 = jnp.argmax(jnp.where(kept_EV, sorted_EV + noise_EV, -jnp.inf), axis=-1)[:, None]
    return jnp.take_along_axis(order_EV, chosen_E1, axis=-1)[:, 0].astype(jnp.int32)


def _scaled(logits_EV: jax.Array, rows: SamplingRows) -> jax.Array:
    return logits_EV / jnp.maximum(rows.temperature_E, 1e-4)[:, None]


def _noise(rows: SamplingRows, position_E: jax.Array, size: int) -> jax.Array:
    """float32 [E, V] standard Gumbel noise; a row's depends on nothing but its seed and position."""

    def of_row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        # large noise decides: 23 bits would let the best of a large vocabulary tie
        return jax.random.gumbel(key, (size,), jnp.float32, mode="high")

    return jax.vmap(of_row)(rows.seed_E, position_E)

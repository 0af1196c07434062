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
    """Only the most likely tokens that together have this probability (after temperature and top-k)."""
    seed: int = 0
    """With the position, all that the draw depends on: the same whatever else is being generated."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 100, f"temperature={self.temperature} is outside [0, 100]")
        require(0 <= self.top_k < 2**31, f"top_k={self.top_k} must be a count, or 0 for all")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} is outside (0, 1]")
        require(0 <= self.seed < 2**32, f"seed={self.seed} is outside [0, 2^32)")


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


def noise_keys(seed_E: jax.Array, position_E: jax.Array) -> jax.Array:
    """uint32 [2, E]: what the noise of a row depends on beside the token."""
    fold = lambda seed, position: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), position))  # noqa: E731
    return jax.vmap(fold, out_axes=1)(seed_E, position_E)


def gumbel(key0: jax.Array, key1: jax.Array, token: jax.Array) -> jax.Array:
    """float32 standard Gumbel noise of uint32 tokens under two key words; shapes broadcast.

    A hash in plain integer arithmetic, so that kernels and XLA draw the same. Large noise, which decides, comes from
    uniforms near 0, where float32 is fine.
    """
    bits = _mix(_mix(token * jnp.uint32(0x9E3779B9) + key0) ^ key1)
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log(-jnp.log1p(-uniform))


def _mix(bits: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: every input bit reaches every output bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return bits ^ (bits >> jnp.uint32(16))


def sample(
    logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array, known_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose a token per row.

    Args:
        logits_EV: float32.
        rows: how.
        position_E: int32 position of the token that the logits follow.
        known_tokens: ids from here on are never chosen; None is no limit.

    Returns:
        int32 tokens, and their float32 log-probability under the model (before temperature and cuts).
    """
    all_EV = logits_EV
    if known_tokens is not None:
        logits_EV = jnp.where(jnp.arange(logits_EV.shape[1])[None, :] < known_tokens, logits_EV, -jnp.inf)
    greedy_E, draws_E = jnp.argmax(logits_EV, axis=-1).astype(jnp.int32), rows.draws_E
    # noise is made only if somebody draws, and the vocabulary is sorted only if somebody cuts it
    level = jnp.any(draws_E).astype(jnp.int32) + jnp.any(rows.cuts_E)
    drawn_E = jax.lax.switch(level, (lambda *_: greedy_E, _draw, _draw_cut), logits_EV, rows, position_E)
    token_E = jnp.where(draws_E, drawn_E, greedy_E)
    picked_E1 = jnp.take_along_axis(all_EV, token_E[:, None], axis=-1)
    return token_E, picked_E1[:, 0] - jax.nn.logsumexp(all_EV, axis=-1)


def _draw(logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array) -> jax.Array:
    """Gumbel-max: the largest of logit and noise is a draw from the softmax."""
    return jnp.argmax(_scaled(logits_EV, rows) + _noise(rows, position_E, logits_EV.shape[1]), axis=-1).astype(
        jnp.int32
    )


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
    keys_2E1 = noise_keys(rows.seed_E, position_E)[:, :, None]
    return gumbel(keys_2E1[0], keys_2E1[1], jnp.arange(size, dtype=jnp.uint32)[None, :])

"""Choosing the next token: greedy, or at random by temperature, top-k and top-p; and telling the most likely ones.

Letters: E rows, V vocabulary, K of its tokens.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.errors import require
from mor_jax.mesh.axes import constrain

MOST_BIASES, LARGEST_BIAS = 300, 100.0
"""Tokens whose logits one request may change, and by how much."""
MOST_ALTERNATIVES = 20
"""Most likely tokens that a request may ask to be told at every position."""


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
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, none twice, and what is added to their logits before all else."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 100, f"temperature={self.temperature} is outside [0, 100]")
        require(0 <= self.top_k < 2**31, f"top_k={self.top_k} must be a count, or 0 for all")
        require(0 <= self.top_p <= 1, f"top_p={self.top_p} is outside [0, 1]")
        require(0 <= self.seed < 2**32, f"seed={self.seed} is outside [0, 2^32)")
        count = len(self.logit_bias)
        require(count <= MOST_BIASES, f"logit_bias={count} tokens are more than {MOST_BIASES}")
        for token, bias in self.logit_bias:
            outside = f"logit_bias={{{token}: {bias}}} is outside [-{LARGEST_BIAS:g}, {LARGEST_BIAS:g}]"
            require(math.isfinite(bias) and abs(bias) <= LARGEST_BIAS, outside)
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


@struct.dataclass
class Bias:
    """What is added to the logits of some tokens of each row."""

    token_EK: Any
    """int32; -1 is none."""
    value_EK: Any
    """float32; minus infinity forbids the token."""

    def add(self, logits_EV: jax.Array) -> jax.Array:
        """Return the changed logits."""
        size = logits_EV.shape[1]
        rows_E1 = jnp.arange(logits_EV.shape[0])[:, None]
        index_EK = jnp.where(self.token_EK < 0, size, self.token_EK)
        return logits_EV.at[rows_E1, index_EK].add(self.value_EK, mode="drop")


@struct.dataclass
class Extras:
    """What few rows ask for, and all pay for while one of them does."""

    bias: Bias
    wanted_E: jax.Array
    """bool: rows that have a bias, or want to know alternatives."""


class Alternatives(NamedTuple):
    """The most likely tokens under the model, the first one first, [..., K]."""

    token: jax.Array
    log_probability: jax.Array


class Sampled(NamedTuple):
    """The token of every row."""

    token_E: jax.Array
    log_probability_E: jax.Array
    """float32, under the model: before bias, temperature and cuts."""
    alternatives: Alternatives
    """K is 0 without extras, and the values are arbitrary where no row wants them."""


def most_likely(logits_XV: jax.Array, known_tokens: int | None = None) -> Alternatives:
    """Return the ``MOST_ALTERNATIVES`` most likely tokens (of a smaller vocabulary, all).

    The log-probabilities are the logits less their normaliser, as everywhere: equal bit by bit to those of the same
    tokens. Those of unknown ids, if they come in at all, are minus infinity.
    """
    log_probability_XV = _known(logits_XV - jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True), known_tokens)
    # whole on every device, as in ``_draw_cut``; not the logits, which would then be so outside of the branch too
    values_XK, token_XK = jax.lax.top_k(constrain(log_probability_XV), min(MOST_ALTERNATIVES, logits_XV.shape[-1]))
    return Alternatives(token_XK.astype(jnp.int32), values_XK)


def _known(logits_XV: jax.Array, known_tokens: int | None) -> jax.Array:
    if known_tokens is None:
        return logits_XV
    return jnp.where(jnp.arange(logits_XV.shape[-1]) < known_tokens, logits_XV, -jnp.inf)


@jax.named_scope("sampling")
def sample(
    logits_EV: jax.Array,
    rows: SamplingRows,
    position_E: jax.Array,
    *,
    known_tokens: int | None = None,
    cuts: bool = True,
    extras: Extras | None = None,
) -> Sampled:
    """Choose a token per row.

    Args:
        logits_EV: float32.
        rows: how.
        position_E: int32 position of the token that the logits follow.
        known_tokens: ids from here on are never chosen; None is no limit.
        cuts: whether rows may cut the vocabulary. If none may, there is no branch, for which a GPU would wait for the
            host: noise is always made.
        extras: what few rows ask for; needs ``cuts``, with whose branch it shares the wait.
    """
    all_EV, logits_EV = logits_EV, _known(logits_EV, known_tokens)
    greedy = lambda logits_EV, *_: jnp.argmax(logits_EV, axis=-1).astype(jnp.int32)  # noqa: E731
    choices = (greedy, _with_draws(_draw), _with_draws(_draw_cut))
    none_EK = jnp.zeros((logits_EV.shape[0], 0), jnp.int32)
    alternatives = Alternatives(none_EK, none_EK.astype(jnp.float32))
    if not cuts:
        token_E = choices[1](logits_EV, rows, position_E)
    else:  # noise is made only if somebody draws, and the vocabulary is sorted only if somebody cuts it
        level = jnp.any(rows.draws_E).astype(jnp.int32) + jnp.any(rows.cuts_E)
        if extras is None:
            token_E = jax.lax.switch(level, choices, logits_EV, rows, position_E)
        else:
            level = jnp.where(jnp.any(extras.wanted_E), len(choices), level)
            branches = (*map(_without_extras, choices), _with_extras(choices[-1], known_tokens))
            token_E, alternatives = jax.lax.switch(level, branches, all_EV, logits_EV, rows, position_E, extras.bias)
    picked_E1 = jnp.take_along_axis(all_EV, token_E[:, None], axis=-1)
    return Sampled(token_E, picked_E1[:, 0] - jax.nn.logsumexp(all_EV, axis=-1), alternatives)


def _with_draws(draw: Any) -> Any:
    """Draw for the rows that do, and take the most likely token for the others."""

    def choose(logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array) -> jax.Array:
        greedy_E = jnp.argmax(logits_EV, axis=-1).astype(jnp.int32)
        return jnp.where(rows.draws_E, draw(logits_EV, rows, position_E), greedy_E)

    return choose


def _without_extras(choose: Any) -> Any:
    def run(all_EV: jax.Array, logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array, bias: Bias) -> Any:
        del all_EV, bias
        shape = (logits_EV.shape[0], min(MOST_ALTERNATIVES, logits_EV.shape[1]))
        return choose(logits_EV, rows, position_E), Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    return run


def _with_extras(choose: Any, known_tokens: int | None) -> Any:
    def run(all_EV: jax.Array, logits_EV: jax.Array, rows: SamplingRows, position_E: jax.Array, bias: Bias) -> Any:
        return choose(bias.add(logits_EV), rows, position_E), most_likely(all_EV, known_tokens)

    return run


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

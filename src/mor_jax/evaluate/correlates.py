"""What the depth of a token goes with: position, frequency, surprisal, place in its word, kind of character.

Plain numpy over routed text (paper section 5, figure 4). Letters: T positions, R recursions, V vocabulary.
"""

import itertools
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mor_jax.evaluate.passes import Tokenizer
from mor_jax.evaluate.routing import RoutedRow

_BINS = 8
_LONGEST_WORD = 4
_PUNCTUATION = set(string.punctuation.encode())
_DIGITS = set(string.digits.encode())
_BLANKS = set(string.whitespace.encode())


@dataclass(frozen=True)
class Group:
    """Tokens that have a property in common."""

    label: str
    tokens: int
    mean_depth: float
    shares: list[float]
    """Share of the tokens at depth 0..R."""


@dataclass(frozen=True)
class Correlate:
    """Depth against one property of the tokens."""

    name: str
    groups: list[Group]
    """In the property's order; groups without tokens are left out."""
    spearman: float | None
    """Rank correlation of depth and property over all tokens; None where the property has no order."""


@dataclass(frozen=True)
class RoutedText:
    """Routed rows with what the model predicted in them."""

    rows: Sequence[RoutedRow]
    surprisals: Sequence[np.ndarray]
    """Per row float [T]: nats of the token that follows each input token, NaN where none is predicted."""
    counts_V: np.ndarray
    """int [V]: how often every token occurs in a reference text, such as the routed one."""
    tokenizer: Tokenizer


def correlates(text: RoutedText) -> list[Correlate]:
    """Relate depth to every property that is known of a token.

    Args:
        text: routed text.

    Returns:
        ``position``, ``frequency``, ``next_surprisal``, ``own_surprisal``, ``word_piece`` and ``characters``.
    """
    spell = _speller(text.tokenizer)
    depth = np.concatenate([row.depth_T for row in text.rows])
    recursions = text.rows[0].recursions
    following = np.concatenate(text.surprisals)
    own = np.concatenate([np.concatenate([[np.nan], nats[:-1]]) for nats in text.surprisals])
    tokens = np.concatenate([row.tokens_T for row in text.rows])
    numbers = {
        "position": np.concatenate([np.arange(len(row.tokens_T)) for row in text.rows]).astype(float),
        "frequency": text.counts_V[tokens].astype(float),
        "next_surprisal": following,
        "own_surprisal": own,
    }
    found = [_numeric(name, values, depth, recursions) for name, values in numbers.items()]
    pieces = np.concatenate([word_pieces(row.tokens_T, spell) for row in text.rows])
    labels = [f"piece {n}" for n in range(1, _LONGEST_WORD)] + [f"piece {_LONGEST_WORD} and on"]
    groups = _grouped(depth, np.minimum(pieces, _LONGEST_WORD) - 1, labels, recursions)
    found.append(Correlate("word_piece", groups, spearman(pieces, depth)))
    kinds = np.array([character_kind(spell(int(token))) for token in tokens])
    names = sorted(set(kinds.tolist()))
    groups = _grouped(depth, np.searchsorted(names, kinds), names, recursions)
    return [*found, Correlate("characters", groups, None)]


def _speller(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    known: dict[int, bytes] = {}

    def spell(token: int) -> bytes:
        if token not in known:
            known[token] = b"" if token == tokenizer.eos_id else tokenizer.token_bytes(token)
        return known[token]

    return spell


def word_pieces(tokens_T: np.ndarray, spell: Callable[[int], bytes]) -> np.ndarray:
    """Number every token within its word, from 1: a token that begins with a blank or a mark begins a word.

    Args:
        tokens_T: int tokens of one row.
        spell: bytes of a token.
    """
    pieces, inside = [], 0
    for token in tokens_T:
        first = spell(int(token))[:1]
        starts = not first or first[0] in _BLANKS or first[0] in _PUNCTUATION
        inside = 1 if starts or inside == 0 else inside + 1
        pieces.append(inside)
    return np.array(pieces, np.int64)


def character_kind(piece: bytes) -> str:
    """Say what a token is made of: `blank`, `punctuation`, `digits`, `letters`, `mixed`, or `end of text`."""
    body = piece.strip(bytes(_BLANKS))
    if not piece:
        return "end of text"
    if not body:
        return "blank"
    kinds = {_kind_of(byte) for byte in body}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _kind_of(byte: int) -> str:
    return "punctuation" if byte in _PUNCTUATION else "digits" if byte in _DIGITS else "letters"


def _numeric(name: str, values: np.ndarray, depth: np.ndarray, recursions: int) -> Correlate:
    """Cut a number into groups of about equal size."""
    known = ~np.isnan(values)
    values, depth = values[known], depth[known]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _BINS + 1)))
    which = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
    ends = list(itertools.pairwise(edges)) or [(edges[0], edges[0])]
    labels = [f"{_short(low)} to {_short(high)}" for low, high in ends]
    return Correlate(name, _grouped(depth, which, labels, recursions), spearman(values, depth))


def _short(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.2g}"


def _grouped(depth: np.ndarray, which: np.ndarray, labels: Sequence[str], recursions: int) -> list[Group]:
    groups = []
    for index, label in enumerate(labels):
        mine = depth[which == index]
        if len(mine):
            shares = np.bincount(mine, minlength=recursions + 1) / len(mine)
            groups.append(Group(label, len(mine), float(mine.mean()), shares.tolist()))
    return groups


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two numbers; ties share their mean rank. 0 if either is constant."""
    ranks = [_ranks(np.asarray(x)) for x in (a, b)]
    spread = [float(r.std()) for r in ranks]
    if min(spread) == 0:
        return 0.0
    centred = [r - r.mean() for r in ranks]
    return float(np.mean(centred[0] * centred[1]) / (spread[0] * spread[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[where]


def as_json(found: Sequence[Correlate]) -> list[dict[str, Any]]:
    """Return the correlates as JSON values."""
    return [asdict(correlate) for correlate in found]


def as_csv(found: Sequence[Correlate]) -> str:
    """Return the groups of all correlates as one CSV table."""
    depths = len(found[0].groups[0].shares)
    lines = [",".join(["property", "group", "tokens", "mean_depth", *(f"share_depth_{d}" for d in range(depths))])]
    for correlate in found:
        for group in correlate.groups:
            shares = [f"{share:.6f}" for share in group.shares]
            lines.append(",".join([correlate.name, group.label, str(group.tokens), f"{group.mean_depth:.6f}", *shares]))
    return "\n".join(lines) + "\n"

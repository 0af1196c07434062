"""Where the router sent real text: depth maps and tables, plain numpy (paper figures 1 and 4).

Letters: B rows, T positions, R recursions, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RoutedRow:
    """One row of text with its way through the recursions; padding is already cut off."""

    tokens_T: np.ndarray
    """int32: the input tokens."""
    depth_T: np.ndarray
    """int32: passes completed, 0..R."""
    scores_RT: np.ndarray
    """float32: raw router output; 0 where not active."""
    gates_RT: np.ndarray
    """float32: gate where one was applied."""
    active_RT: np.ndarray
    """bool: whether recursion r's router could choose the token."""
    selected_RT: np.ndarray
    """bool: whether recursion r computed the token."""

    @property
    def recursions(self) -> int:
        """R, the most passes that a token can take."""
        return self.scores_RT.shape[0]


@dataclass(frozen=True)
class TokenDepth:
    """How deep one vocabulary entry went."""

    token: int
    count: int
    mean_depth: float


def routed_rows(tokens_BT: np.ndarray, segment_ids_BT: np.ndarray, trace: Any) -> list[RoutedRow]:
    """Cut a batch's routing trace into rows.

    Args:
        tokens_BT: int32 input tokens.
        segment_ids_BT: int32; 0 is padding, which stands last in its row.
        trace: the ``RoutingTrace`` of these tokens (numpy or jax arrays).

    Returns:
        One ``RoutedRow`` for every row that holds a token.
    """
    rows = []
    for b, length in enumerate(np.count_nonzero(np.asarray(segment_ids_BT), axis=1)):
        by_recursion = (trace.scores_RBT, trace.gates_RBT, trace.active_RBT, trace.selected_RBT)
        if length:
            head = (np.asarray(tokens_BT)[b, :length], np.asarray(trace.depth_BT)[b, :length])
            rows.append(RoutedRow(*head, *(np.asarray(x)[:, b, :length] for x in by_recursion)))
    return rows


def tokens_per_depth(rows: Sequence[RoutedRow]) -> np.ndarray:
    """Share of tokens that completed 0, 1, ..., R passes: float64 [R+1], adding up to 1."""
    counts = np.bincount(np.concatenate([row.depth_T for row in rows]), minlength=rows[0].recursions + 1)
    return counts / counts.sum()


def depth_by_position(rows: Sequence[RoutedRow], bins: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Share of tokens at every depth along the row.

    Args:
        rows: routed text; rows may differ in length.
        bins: intervals of equal length that the longest row is cut into (fewer if it is shorter).

    Returns:
        (first position of each bin int64 [bins], share float64 [bins, R+1] with rows adding up to 1).
    """
    longest = max(len(row.depth_T) for row in rows)
    bins = min(bins, longest)
    counts = np.zeros((bins, rows[0].recursions + 1))
    for row in rows:
        bin_T = np.arange(len(row.depth_T)) * bins // longest
        np.add.at(counts, (bin_T, row.depth_T), 1)
    starts = -(-np.arange(bins) * longest // bins)  # the first position whose bin is this one
    return starts, counts / counts.sum(axis=1, keepdims=True)


def depth_by_token(rows: Sequence[RoutedRow], *, at_least: int = 1) -> list[TokenDepth]:
    """Mean depth of every vocabulary entry in the text, deepest first, then by count and token.

    Args:
        rows: routed text.
        at_least: occurrences below which an entry is left out.
    """
    tokens = np.concatenate([row.tokens_T for row in rows])
    depths = np.concatenate([row.depth_T for row in rows])
    ids, where, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    means = np.bincount(where, weights=depths) / counts
    table = zip(ids, counts, means, strict=True)
    kept = [TokenDepth(int(i), int(n), float(mean)) for i, n, mean in table if n >= at_least]
    return sorted(kept, key=lambda entry: (-entry.mean_depth, -entry.count, entry.token))


def deepest_and_shallowest(entries: Iterable[TokenDepth], count: int) -> tuple[list[TokenDepth], list[TokenDepth]]:
    """Return the ``count`` deepest entries and the ``count`` shallowest, which never overlap."""
    entries = list(entries)
    count = min(count, len(entries) // 2)
    return entries[:count], entries[len(entries) - count :][::-1]

"""The host's book of pages: what every row of the page tables holds, what rows share, and which prefixes are known.

A prefix is known by a chain of hashes, one per block of ``page_size`` tokens; each covers all tokens before it, and the
budget of passes, which changes keys and values as tokens do. What else does (weights, boundaries, attention, the pages'
dtype) is one engine's, and so is the book. Under recursion-wise caching a block of tokens has another number of entries
in every recursion, so the book keeps each token's depth: the entries that t tokens have in a group are the first of it,
as many as tokens among them came that deep. Any block's end is thus a place where another sequence can begin.

The device deals out pages by itself, and the host does not know their names. But it knows how many entries each group
has, so it keeps names of its own, one for one: a count of those names is the count of pages.
"""

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.exchange import Orders

_KEY_BYTES = 16


def chain(tokens: Sequence[int], budget: int, size: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """Return the keys of all whole blocks of ``size`` tokens, given those of the first ones."""
    keys = list(before)
    for begin in range(len(keys) * size, len(tokens) - size + 1, size):
        last = keys[-1] if keys else budget.to_bytes(_KEY_BYTES, "little")
        block = array("i", tokens[begin : begin + size]).tobytes()
        keys.append(hashlib.blake2b(last + block, digest_size=_KEY_BYTES).digest())
    return keys


@dataclass
class Row:
    """What the host knows of a row of the page tables."""

    tokens: list[int]
    """At least as many as there are depths; whoever generates appends to it."""
    budget: int
    """Of passes per token."""
    depths: bytearray = field(default_factory=bytearray)
    """Passes of every token that has all its entries."""
    keys: list[bytes] = field(default_factory=list)
    """Of the whole blocks among those."""
    lengths: list[list[int]] = field(default_factory=list)
    """Entries of those, per pool and group."""
    pages: list[list[list[int]]] = field(default_factory=list)
    """The host's names of their pages, per pool and group."""


class PageBook:
    """Keeps the book and writes the orders that the device must carry out.

    Args:
        places: rows that write.
        kept: rows of sequences that have ended.
        pages: that there are, of the block's pool and the edge's, if any.
        page_size: entries of a page, and tokens of a block.
        layout: of the caches.
    """

    def __init__(self, places: int, kept: int, pages: Sequence[int], page_size: int, layout: KvLayout) -> None:
        self.pages, self.size = list(pages), page_size
        self._layout, self._places, self._count = layout, places, places + kept
        self._rows: dict[int, Row] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """The one that was used longest ago comes first."""
        self._unused = list(range(places, places + kept))
        self._holders: dict[bytes, dict[int, None]] = {}
        self._all: list[dict[int, int]] = [{} for _ in pages]
        self._seated: list[dict[int, int]] = [{} for _ in pages]
        self._names = itertools.count()
        self._drops: set[int] = set()
        self._sources: dict[int, tuple[int, list[list[int]]]] = {}

    @property
    def keeps(self) -> bool:
        """Whether there are rows for sequences that have ended."""
        return self._count > self._places

    @property
    def used(self) -> list[int]:
        """Pages that some row holds, per pool, as far as depths are known."""
        return [len(pages) for pages in self._all]

    @property
    def seated(self) -> list[int]:
        """Those of them that a place holds."""
        return [len(pages) for pages in self._seated]

    def held(self, row: int) -> list[int]:
        """Pages of a row, shared ones too, per pool."""
        return [sum(map(len, groups)) for groups in self._rows[row].pages]

    def lengths(self, row: int) -> list[list[int]]:
        """Entries of a row, per pool and group."""
        return self._rows[row].lengths

    def full(self, row: int) -> list[int]:
        """Groups of a row whose next entry takes another page, per pool."""
        return [sum(entries % self.size == 0 for entries in groups) for groups in self._rows[row].lengths]

    def find(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first blocks are known."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._holders), 0)

    def open(self, place: int, tokens: list[int], budget: int, keys: Sequence[bytes]) -> int:
        """Begin a row of a place with the longest known prefix.

        Args:
            place: an empty one.
            tokens: of the sequence; grows with it.
            budget: passes per token.
            keys: of the blocks that may be taken over.

        Returns:
            Tokens that need not be read.
        """
        row, blocks = Row(tokens, budget), self.find(keys)
        if not blocks:
            row.lengths, row.pages = self._entries(b""), [[[] for _ in groups] for groups in self._entries(b"")]
            self._rows[place] = row
            return 0
        source = next(reversed(self._holders[keys[blocks - 1]]))
        if source in self._kept:
            self._kept.move_to_end(source)
        self._take(place, row, source, blocks, copies=True)
        return blocks * self.size

    def learn(self, place: int, depths: Sequence[int]) -> None:
        """Note the depths of a place's next tokens, whose entries are all there."""
        row, depths = self._rows[place], bytes(depths)
        row.depths += depths
        for nth, more in enumerate(self._entries(depths)):
            for group, entries in enumerate(more):
                row.lengths[nth][group] += entries
                pages = row.pages[nth][group]
                missing = self._of(row.lengths[nth][group]) - len(pages)
                if missing > 0:
                    self._hold(place, nth, fresh := list(itertools.islice(self._names, missing)))
                    pages += fresh
        known = len(row.keys)
        if self.keeps and known < len(row.depths) // self.size:
            row.keys = chain(row.tokens[: len(row.depths)], row.budget, self.size, row.keys)
            for key in row.keys[known:]:
                self._holders.setdefault(key, {})[place] = None

    def close(self, place: int, *, keep: bool = True) -> None:
        """Empty a place; what it alone knows is kept, if wanted, in the row that was used longest ago."""
        row = self._rows[place]
        if keep and self.keeps and row.keys and len(self._holders[row.keys[-1]]) == 1:
            if not self._unused:
                self.evict()
            index = self._unused.pop()
            kept = Row(row.tokens[: len(row.keys) * self.size], row.budget)
            self._take(index, kept, place, len(row.keys), copies=False)
            self._kept[index] = None
        self._drop(place)

    def leave(self, place: int) -> None:
        """Empty a place for which nothing has been launched since ``open``: the device has nothing of it to drop."""
        self._drop(place, ordered=False)

    def evict(self) -> bool:
        """Drop the kept row that was used longest ago, if there is one."""
        if not self._kept:
            return False
        index, _ = self._kept.popitem(last=False)
        self._drop(index)
        self._unused.append(index)
        return True

    def take_orders(self, *, empty: bool = False) -> Orders | None:
        """Return what the device has to do since the last time; None (unless ``empty``) is nothing."""
        if not (self._drops or self._sources or empty):
            return None
        drop_S, source_S = np.zeros(self._count, bool), np.full(self._count, -1, np.int32)
        lengths = tuple(np.zeros((self._count, len(groups)), np.int32) for groups in self._entries(b""))
        drop_S[list(self._drops)] = True
        for row, (source, entries) in self._sources.items():
            source_S[row] = source
            for length_SG, groups in zip(lengths, entries, strict=True):
                length_SG[row] = groups
        self._drops, self._sources = set(), {}
        return Orders(drop_S, source_S, lengths)

    def _take(self, index: int, row: Row, source: int, blocks: int, copies: bool) -> None:
        """Let a row begin with the first blocks of another one."""
        old, count = self._rows[source], blocks * self.size
        row.depths, row.keys = old.depths[:count], old.keys[:blocks]
        row.lengths = self._entries(bytes(row.depths))
        for nth, groups in enumerate(row.lengths):
            shared = [entries // self.size if copies else self._of(entries) for entries in groups]
            row.pages.append([pages[:n] for pages, n in zip(old.pages[nth], shared, strict=True)])
            for entries, pages in zip(groups, row.pages[nth], strict=True):
                pages += [next(self._names) for _ in range(self._of(entries) - len(pages))]
                self._hold(index, nth, pages)
        for key in row.keys:
            self._holders[key][index] = None
        self._rows[index] = row
        # the device takes rows as they are before all orders: what is about to move is still where it comes from
        first, _ = self._sources.get(source, (source, None))
        self._sources[index] = (first, [list(groups) for groups in row.lengths])

    def _drop(self, index: int, *, ordered: bool = True) -> None:
        row = self._rows.pop(index)
        for key in row.keys:
            del self._holders[key][index]
            if not self._holders[key]:
                del self._holders[key]
        for nth, groups in enumerate(row.pages):
            for counts in (self._all[nth], self._seated[nth])[: 1 + (index < self._places)]:
                for page in itertools.chain(*groups):
                    counts[page] -= 1
                    if not counts[page]:
                        del counts[page]
        self._sources.pop(index, None)
        if ordered:
            self._drops.add(index)

    def _hold(self, index: int, pool: int, pages: Sequence[int]) -> None:
        for counts in (self._all[pool], self._seated[pool])[: 1 + (index < self._places)]:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1

    def _of(self, entries: int) -> int:
        return -(-entries // self.size)

    def _entries(self, depths: bytes) -> list[list[int]]:
        """Entries that tokens of some depths have, per pool and group."""
        count = len(depths)
        if self._layout.holds_all:
            return [[count], [count]][: len(self.pages)]
        shallower = itertools.accumulate(depths.count(depth) for depth in range(self._layout.groups))
        return [[count - ends for ends in shallower], [count]][: len(self.pages)]

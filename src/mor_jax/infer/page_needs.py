"""How many pages a sequence takes: at most, by what others like it took, and until the host looks again.

Letters: G groups.
"""

from collections.abc import Sequence

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.request import Request

_WEIGHT = 0.05
"""Of the last sequence in the running means."""


class PageNeeds:
    """Counts pages, per pool: the block's, and the edge's if there is one.

    Args:
        layout: of the caches.
        pools: that there are.
        page_size: entries of a page.
        steps: of a dispatch.
    """

    def __init__(self, layout: KvLayout, pools: int, page_size: int, steps: int) -> None:
        self._groups, self._pools, self._size = layout.groups, pools, page_size
        # a pass in every step; the worst is a page for an entry in each group, but for one that gets all others
        rest = steps - layout.groups + 1
        self._dispatch = [layout.groups - 1 + self._of(rest) if rest > 0 else steps, self._of(steps)][:pools]
        self._shares: list[list[float]] | None = None
        """Entries per token, per pool and group."""
        self._generated: float | None = None
        """Tokens of a completion."""

    def at_most(self, request: Request) -> list[int]:
        """Pages of the whole sequence if every token goes through all recursions; the last token is never cached."""
        pages = self._of(len(request.prompt) + max(1, request.max_tokens) - 1)
        return [pages * self._groups, pages][: self._pools]

    def of_launch(self, tokens: int | None) -> list[int]:
        """Pages that reading so many tokens takes at most; None is a dispatch."""
        if tokens is None:
            return self._dispatch
        pages = self._of(tokens)
        return [pages * self._groups, pages][: self._pools]

    def expected(self, request: Request, generated: int) -> list[int]:
        """Pages at its end if it goes as deep, and on as long, as others did; before there were any, ``at_most``."""
        if self._shares is None or self._generated is None:
            return self.at_most(request)
        left = max(1.0, self._generated - generated)
        tokens = len(request.prompt) + min(request.max_tokens, generated + left) - 1
        pages = [sum(self._of(share * tokens) for share in shares) for shares in self._shares]
        return list(map(min, pages, self.at_most(request)))

    def note(self, lengths: Sequence[Sequence[int]], tokens: int, generated: int) -> None:
        """Learn from a sequence that has ended: its entries per pool and group, and how many tokens have them."""
        shares = [[entries / tokens for entries in groups] for groups in lengths]
        if self._shares is None or self._generated is None:
            self._shares, self._generated = shares, float(generated)
            return
        for old, new in zip(self._shares, shares, strict=True):
            old[:] = [a + _WEIGHT * (b - a) for a, b in zip(old, new, strict=True)]
        self._generated += _WEIGHT * (generated - self._generated)

    def _of(self, entries: float) -> int:
        return int(-(-entries // self._size))

"""The host's side of admission: who waits, who holds a place on the device, and the pages promised to each."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.request import Request


@dataclass
class Place:
    """What the host knows of a place on the device."""

    number: int
    request: Request
    read: int = 0
    """Prompt tokens read."""
    admitted: bool = False
    answered: bool = False
    """Whether its first token has been handed out."""
    scores: list[tuple[jax.Array, int, int]] = field(default_factory=list)
    """Of the chunks read: packed ``prefill.PromptScoring`` on the device, the row in it, and how many tokens of it."""

    @property
    def unread(self) -> int:
        """Prompt tokens still to read before it starts; the last one enters like a generated token."""
        return len(self.request.prompt) - 1 - self.read


class Places:
    """A queue before a fixed number of places. A request gets one when the pages that it may need are sure to be there.

    Args:
        count: places.
        pages: that there are, of the block's pool and the edge's, if any.
        page_size: entries of a page.
        layout: of the caches.
    """

    def __init__(self, count: int, pages: Sequence[int], page_size: int, layout: KvLayout) -> None:
        self.pages, self.promised = list(pages), [0] * len(pages)
        self.queue: deque[tuple[int, Request]] = deque()
        self._page_size, self._groups = page_size, layout.groups
        self._places: list[Place | None] = [None] * count

    def __getitem__(self, index: int) -> Place | None:
        return self._places[index]

    @property
    def taken(self) -> Iterator[tuple[int, Place]]:
        """Places that somebody holds, with their index."""
        return ((index, place) for index, place in enumerate(self._places) if place is not None)

    @property
    def numbers(self) -> list[int]:
        """Number of the request in every place; -1 is none."""
        return [-1 if place is None else place.number for place in self._places]

    def needed(self, request: Request) -> list[int]:
        """Pages that a request takes at most, per pool: the last token generated is never cached."""
        pages = -(-(len(request.prompt) + max(1, request.max_tokens) - 1) // self._page_size)
        return [pages * self._groups, pages][: len(self.pages)]

    def seat(self) -> None:
        """Give free places to the oldest requests whose pages are sure to be there; nobody overtakes."""
        for index, place in enumerate(self._places):
            if not self.queue or not self._fits(self.queue[0][1]):
                return
            if place is None:
                number, request = self.queue.popleft()
                self._promise(request, 1)
                self._places[index] = Place(number, request)

    def empty(self, index: int) -> None:
        """Take a place back."""
        place = self._places[index]
        assert place is not None
        self._promise(place.request, -1)
        self._places[index] = None

    def _promise(self, request: Request, sign: int) -> None:
        self.promised = [p + sign * n for p, n in zip(self.promised, self.needed(request), strict=True)]

    def _fits(self, request: Request) -> bool:
        triples = zip(self.promised, self.needed(request), self.pages, strict=True)
        return all(promised + needed <= pages for promised, needed, pages in triples)

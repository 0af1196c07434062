"""The host's side of admission: who waits, who holds a place on the device, and whether there are pages for all."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.page_book import PageBook, chain
from mor_jax.infer.request import Request


@dataclass
class Progress:
    """How far a request has come."""

    number: int
    request: Request
    text: list[int]
    """Tokens of the prompt, and those generated."""
    keys: list[bytes]
    """Of the whole blocks of the text that may be taken over from others."""
    end: int
    """Tokens to read before it starts; the last one of the text enters like a generated one."""
    read: int = 0
    """Tokens read, or taken over."""
    found: int = 0
    """Those of them taken over."""
    admitted: bool = False
    answered: bool = False
    """Whether its first token has been handed out."""
    scores: list[tuple[jax.Array, int, int]] = field(default_factory=list)
    """Of the chunks read: packed ``prefill.PromptScoring`` on the device, the row in it, and how many tokens of it."""

    @property
    def unread(self) -> int:
        """Tokens still to read before it starts."""
        return self.end - self.read

    @property
    def generated(self) -> int:
        """Tokens generated."""
        return len(self.text) - len(self.request.prompt)


class Places:
    """A queue before a fixed number of places. A request gets one when the pages that it may need are sure to be there.

    Args:
        count: places.
        book: of all pages.
        layout: of the caches.
        chunk: tokens of a prompt that are read at a time.
    """

    def __init__(self, count: int, book: PageBook, layout: KvLayout, chunk: int) -> None:
        self.book, self.queue = book, deque[Progress]()
        self._layout, self._chunk = layout, chunk
        self._places: list[Progress | None] = [None] * count

    def __getitem__(self, index: int) -> Progress | None:
        return self._places[index]

    @property
    def taken(self) -> Iterator[tuple[int, Progress]]:
        """Places that somebody holds, with their index."""
        return ((index, place) for index, place in enumerate(self._places) if place is not None)

    @property
    def numbers(self) -> list[int]:
        """Number of the request in every place; -1 is none."""
        return [-1 if place is None else place.number for place in self._places]

    def budget(self, request: Request) -> int:
        """Passes per token."""
        return min(request.max_depth or self._layout.passes, self._layout.passes)

    def needed(self, request: Request) -> list[int]:
        """Pages that a request takes at most, per pool: the last token generated is never cached."""
        pages = -(-(len(request.prompt) + max(1, request.max_tokens) - 1) // self.book.size)
        return [pages * self._layout.groups, pages][: len(self.book.pages)]

    def wait(self, number: int, request: Request) -> None:
        """Put a request at the end of the queue."""
        text, size = list(request.prompt), self.book.size
        # the scores of a prompt are those of tokens that are read
        keys = [] if request.score_prompt else chain(text[:-1], self.budget(request), size)
        self.queue.append(Progress(number, request, text, keys, end=len(text) - 1))

    def seat(self) -> None:
        """Give free places to the oldest requests whose pages are sure to be there; nobody overtakes."""
        for index, place in enumerate(self._places):
            if not self.queue:
                return
            if place is None:
                self._places[index] = progress = self.queue[0]
                self._open(index, progress)
                if not self._make_room():
                    self.empty(index, keep=False)
                    return
                self.queue.popleft()

    def empty(self, index: int, *, keep: bool = True) -> None:
        """Take a place back; what it alone knows of prefixes is kept if there is a row for it."""
        self.book.close(index, keep=keep)
        self._places[index] = None

    def to_read(self, most: int) -> list[tuple[int, Progress]]:
        """Return the oldest places with something to read, each with the longest prefix that is known by now."""
        unread = sorted(((i, p) for i, p in self.taken if p.unread), key=lambda entry: entry[1].number)
        found: list[tuple[int, Progress]] = []
        for index, progress in unread:
            if len(found) == most:
                break
            if progress.read == progress.found and progress.keys:  # it has read nothing by itself
                blocks = self.book.find(progress.keys)
                if self._is_coming(progress, blocks):
                    continue
                if blocks * self.book.size > progress.found:
                    self.book.close(index, keep=False)
                    self._open(index, progress)
            if progress.unread:
                found.append((index, progress))
        return found

    def _open(self, index: int, progress: Progress) -> None:
        request = progress.request
        progress.read = progress.found = self.book.open(
            index, progress.text, self.budget(request), progress.keys[: progress.end // self.book.size]
        )

    def _is_coming(self, progress: Progress, blocks: int) -> bool:
        """Whether an older request is about to read at least a chunk of the same tokens."""
        last = blocks + max(1, self._chunk // self.book.size) - 1
        older = (other.keys for _, other in self.taken if other.number < progress.number)
        return last < len(progress.keys) and any(keys[last : last + 1] == [progress.keys[last]] for keys in older)

    def _make_room(self) -> bool:
        """Evict kept rows until all places have the pages that they may need; if that is not enough, evict none."""
        more = [0] * len(self.book.pages)
        for index, progress in self.taken:
            needed = zip(more, self.needed(progress.request), self.book.held(index), strict=True)
            more = [total + most - held for total, most, held in needed]
        if not self._fit(self.book.seated, more):
            return False
        while not self._fit(self.book.used, more):
            self.book.evict()
        return True

    def _fit(self, pages: Sequence[int], more: Sequence[int]) -> bool:
        triples = zip(pages, more, self.book.pages, strict=True)
        return all(held + extra <= there for held, extra, there in triples)

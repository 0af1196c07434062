"""The host's side of admission: who waits, who holds a place on the device, and whether there are pages for all."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.page_book import PageBook, chain
from mor_jax.infer.page_needs import PageNeeds
from mor_jax.infer.request import Request

MOST_PREEMPTIONS = 3
"""Times that a sequence may lose its place; the next one it gets when all that it may need is there, and keeps it."""


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
    flying: list[int] = field(default_factory=list)
    """Pages that what has been launched for it may take, per pool."""
    preempted: int = 0
    """Times that it lost its place."""
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
    """A queue before a fixed number of places.

    A request gets one when there are pages for all, if they need what others did. If they need more and pages run out,
    the youngest goes back to the head of the queue, and is read again: its prompt and what it has generated.

    Args:
        count: places.
        book: of all pages.
        layout: of the caches.
        chunk: tokens of a text that are read at a time.
        steps: of a dispatch.
    """

    def __init__(self, count: int, book: PageBook, layout: KvLayout, *, chunk: int, steps: int) -> None:
        self.book, self.queue = book, deque[Progress]()
        self.needs = PageNeeds(layout, len(book.pages), book.size, steps)
        self._passes, self._chunk = layout.passes, chunk
        self._places: list[Progress | None] = [None] * count
        self._most = [0] * len(book.pages)
        """Pages that those who hold places may take at most, per pool."""

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
        return min(request.max_depth or self._passes, self._passes)

    def wait(self, number: int, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(self._from_beginning(Progress(number, request, list(request.prompt), [], 0)))

    def _from_beginning(self, progress: Progress) -> Progress:
        """Let all of a text be read, or found."""
        request, text = progress.request, progress.text
        # the scores of a prompt are those of tokens that are read
        passes_by = request.score_prompt or not self.book.keeps
        progress.keys = [] if passes_by else chain(text[:-1], self.budget(request), self.book.size)
        progress.end, progress.read, progress.found = len(text) - 1, 0, 0
        progress.flying, progress.admitted, progress.scores = [0] * len(self.book.pages), False, []
        return progress

    def seat(self) -> None:
        """Give free places to the oldest requests while there are pages; nobody overtakes."""
        free = [index for index, place in enumerate(self._places) if place is None]
        if not (free and self.queue):
            return
        expected: list[list[int]] = []  # of all, counted once: who comes changes nothing of the others'
        for index in free[: len(self.queue)]:
            progress = self.queue[0]
            self._hold(index, progress)
            self._open(index, progress)
            if expected or not self._has_plenty():
                expected += [self._expects(*entry) for entry in ([(index, progress)] if expected else self.taken)]
                if not self._fit(expected):
                    self.book.leave(index)
                    self._hold(index, None)
                    return
            self.queue.popleft()

    def empty(self, index: int, *, keep: bool = True) -> None:
        """Take a place back; what it alone knows of prefixes is kept if there is a row for it."""
        self.book.close(index, keep=keep)
        self._hold(index, None)

    def _hold(self, index: int, progress: Progress | None) -> None:
        """Give a place to a request, or to nobody."""
        for holder, sign in ((self._places[index], -1), (progress, 1)):
            if holder is not None:
                pages = self.needs.at_most(holder.request)
                self._most = [most + sign * n for most, n in zip(self._most, pages, strict=True)]
        self._places[index] = progress

    def _has_plenty(self) -> bool:
        """Whether all find pages even at their longest and deepest, beside what is kept: then nothing need be counted.

        A sequence never takes more than that, and pages that several share are counted for each.
        """
        book = zip(self._most, self.book.used, self.book.seated, self.book.pages, strict=True)
        return all(most + used - seated <= pages for most, used, seated, pages in book)

    def finish(self, index: int) -> None:
        """Take a place back, and learn from what its request took."""
        progress = self._places[index]
        assert progress is not None
        self.needs.note(self.book.lengths(index), len(progress.text) - 1, progress.generated)
        self.empty(index)

    def launched(self, progress: Progress, tokens: int | None) -> None:
        """Something has been launched for a request: reading so many tokens, or (None) a dispatch."""
        for pool, pages in enumerate(self.needs.of_launch(tokens)):
            progress.flying[pool] += pages

    def landed(self, progress: Progress, tokens: int | None) -> None:
        """The host has looked at it, and will learn what it took."""
        for pool, pages in enumerate(self.needs.of_launch(tokens)):
            progress.flying[pool] -= pages

    def have_room(self, reading: Sequence[tuple[int, Progress]]) -> bool:
        """Whether there are pages for a dispatch and for reading some texts; drops kept prefixes if that helps."""
        if self._has_plenty():
            return True
        reads = {index for index, _ in reading}
        idle = lambda index, progress: progress.unread and index not in reads  # noqa: E731
        return self._fit([self._takes(*entry, idle=bool(idle(*entry))) for entry in self.taken])

    def preempt_youngest(self) -> None:
        """Send the request that came last back to the queue, but not one that was sent too often."""
        loses = (entry for entry in self.taken if entry[1].preempted < MOST_PREEMPTIONS)
        index, progress = max(loses, key=lambda entry: entry[1].number)
        self.empty(index, keep=False)
        progress.preempted += 1
        self.queue.appendleft(self._from_beginning(progress))

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

    def _takes(self, index: int, progress: Progress, *, idle: bool = False) -> list[int]:
        """Pages that a place may take before the host looks again; one that keeps its place, ever."""
        left = [a - b for a, b in zip(self.needs.at_most(progress.request), self.book.held(index), strict=True)]
        if progress.preempted >= MOST_PREEMPTIONS:
            return left
        more = progress.flying
        if not idle:
            launch = self.needs.of_launch(min(self._chunk, progress.unread) if progress.unread else None)
            more = [a + b for a, b in zip(more, launch, strict=True)]
        if progress.admitted:  # a token that is on its way has entries, but its depth is not known yet
            more = [a + b for a, b in zip(more, self.book.full(index), strict=True)]
        return list(map(min, left, more))

    def _expects(self, index: int, progress: Progress) -> list[int]:
        """Pages that a place takes until its request ends, if that is like others."""
        expected = self.needs.expected(progress.request, progress.generated)
        more = [a - b for a, b in zip(expected, self.book.held(index), strict=True)]
        return list(map(max, self._takes(index, progress), more))

    def _fit(self, more: Sequence[Sequence[int]]) -> bool:
        """Whether all places find so many pages; drops what is kept for that, but none in vain."""
        total, pages = [sum(pool) for pool in zip(*more, strict=True)], self.book.pages
        fits = lambda held: all(a + b <= there for a, b, there in zip(held, total, pages, strict=True))  # noqa: E731
        if not more:
            return True
        if not fits(self.book.seated):
            return False
        while not fits(self.book.used):
            self.book.evict()
        return True

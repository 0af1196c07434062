"""From generated tokens to text that can be shown as it grows: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        ...


class GrowingText:
    """The text of one completion; a token costs the same however long the text is.

    Args:
        tokenizer: decodes the tokens.
        stop: strings that end the text and do not belong to it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._settled = ""
        # The last tokens alone are decoded. The first of them are settled already, and there because some tokenizers
        # drop a space at the very beginning.
        self._window: list[int] = []
        self._window_settled = 0
        self._shown = 0
        self.text = ""
        """All text so far."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int, *, last: bool = False) -> str:
        """Take a token and return the text that can now be shown: nothing that may change, or begin a stop string."""
        if self.stopped:
            return ""
        known = len(self._settled)
        self._grow(token)
        places = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        sure = len(self.text) if last or self.stopped else len(self.text) - self._held_back()
        piece, self._shown = self.text[self._shown : max(sure, self._shown)], max(sure, self._shown)
        return piece

    def _grow(self, token: int) -> None:
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        fresh = decoded[len(self._tokenizer.decode(self._window[: self._window_settled])) :]
        self.text = self._settled + fresh
        if fresh and not fresh.endswith(_INCOMPLETE):
            self._settled = self.text
            self._window = self._window[self._window_settled :]
            self._window_settled = len(self._window)

    def _held_back(self) -> int:
        """Characters at the end that are half of one, or the beginning of a stop string."""
        whole = self.text.rstrip(_INCOMPLETE)
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(self.text) - len(whole) + max(lengths, default=0)

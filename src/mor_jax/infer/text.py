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
    """The text of one completion.

    Args:
        tokenizer: decodes the tokens.
        stop: strings that end the text and do not belong to it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""
        """All text so far."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int, *, last: bool = False) -> str:
        """Take a token and return the text that can now be shown: nothing that may change, or begin a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens)
        found = [place for place in (self.text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        sure = len(self.text) if last or self.stopped else len(self.text) - self._held_back()
        piece, self._shown = self.text[self._shown : max(sure, self._shown)], max(sure, self._shown)
        return piece

    def _held_back(self) -> int:
        """Characters at the end that are half of one, or the beginning of a stop string."""
        whole = self.text.rstrip(_INCOMPLETE)
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(self.text) - len(whole) + max(lengths, default=0)

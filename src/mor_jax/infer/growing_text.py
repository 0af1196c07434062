"""From generated tokens to text that can be shown as it grows: whole characters, and nothing of a stop string.

The text of a completion is that of prompt and completion together without the prompt's. A decoder that strips or merges
at the start of a text (sentencepiece's first space, a continued word, half a character) thus does so at the prompt.
"""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT, _CONTEXT_CHARACTERS = 8, 4


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        ...

    def may_change(self, ids: Sequence[int], /) -> bool:
        """Whether what follows can change the text of ids beyond an unfinished character at its end."""
        ...


class GrowingText:
    """The text of one completion; a token costs the same however long the text is.

    Args:
        tokenizer: decodes the tokens.
        stop: strings that end the text and do not belong to it.
        prompt: the tokens before it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._settled = ""
        # Only the last tokens are decoded: those whose text may still change, and before them some that are settled.
        self._window = _context(tokenizer, prompt)
        self._before = tokenizer.decode(self._window)
        self._window_settled = len(self._window)
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
        settled = self._grow(token)
        places = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        sure = len(self.text) if last or self.stopped else self._sure(settled)
        piece, self._shown = self.text[self._shown : max(sure, self._shown)], max(sure, self._shown)
        return piece

    def _grow(self, token: int) -> bool:
        """Decode one more token; whether all of the text is settled."""
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        start = len(self._before)
        if self._before.endswith(_INCOMPLETE):  # the rest of the prompt's last character may have come
            pairs = zip(self._before, decoded, strict=False)
            start = next((i for i, (old, new) in enumerate(pairs) if old != new), start)
        fresh = decoded[start:]
        self.text = self._settled + fresh
        if self._tokenizer.may_change(self._window):
            return False
        if fresh and not fresh.endswith(_INCOMPLETE):
            self._settled = self.text
            self._window = self._window[self._window_settled :]
            self._window_settled = len(self._window)
            self._before = self._tokenizer.decode(self._window)
        return True

    def _sure(self, settled: bool) -> int:
        """Characters that cannot change, and begin no stop string."""
        whole = self.text.rstrip(_INCOMPLETE) if settled else self._settled
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(whole) - max(lengths, default=0)


def _context(tokenizer: Decoder, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt from which on texts decode as they do behind all of it."""
    size = _CONTEXT
    while size < len(prompt):
        tail, longer = list(prompt[-size:]), list(prompt[-2 * size :])
        text = tokenizer.decode(tail)
        whole = not tokenizer.may_change(list(prompt[-2 * size : -size]))
        if whole and len(text) >= _CONTEXT_CHARACTERS and tokenizer.decode(longer).endswith(text):
            return tail
        size *= 2
    return list(prompt)

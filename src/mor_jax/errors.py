"""The one exception that means "the user's input is wrong": the CLI prints it and exits with code 2."""

import errno
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

UNUSABLE_PATH = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
"""Errors of the operating system about a path that the user gave; any other is a fault of the program."""


_LONGEST_REASON = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class UserError(ValueError):
    """A configuration, file, checkpoint, flag or prompt that cannot be used.

    The message names the field, the value and the rule that it breaks.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def reason(error: BaseException) -> str:
    """Return what a library's error says, on one line and not too long; its name if it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    words = " ".join(text.split()) or type(error).__name__
    return words if len(words) <= _LONGEST_REASON else words[: _LONGEST_REASON - 3] + "..."


def one_line(text: object) -> str:
    """Return a message on one line that any stream can show: names of files may hold line breaks, and no UTF-8."""
    return " ".join(str(text).splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: object) -> str:
    """Return ``repr(value)`` on one line, cut where it is long or deep: what was given may be both."""
    return " ".join(_SHORT.repr(value).split())


def require_text(text: str, what: str) -> str:
    """Return a text that UTF-8 can carry.

    Raises:
        UserError: it holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        kind = f"U+{code:04X}, half of a pair"
        if 0xDC80 <= code <= 0xDCFF:  # what Python makes of such bytes
            kind += f", or the byte {code - 0xDC00:#04x} of what is not UTF-8"
        raise UserError(f"{what}: character {error.start + 1} is a lone surrogate ({kind})") from error
    return text

"""The one exception that means "the user's input is wrong": the CLI prints it and exits with code 2."""

import errno
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

"""Which files of a folder are data: every one of a known kind, through links as well; what is left out is said."""

import logging
import os
from collections import deque
from pathlib import Path

from mor_jax.data.readers import KNOWN, is_corpus_file, is_metadata
from mor_jax.errors import UserError, reason, require

_log = logging.getLogger(__name__)
_SHOWN = 3


def folder_files(folder: Path) -> list[Path]:
    """List the data files of a folder and its sub-folders, sorted; log once what is left out, and why.

    Links to files and folders are followed; a file that is reached twice counts once, by its own path where that is in
    the folder. Hidden files and folders (``.ipynb_checkpoints``) are left out, and so are files of unknown kinds and
    ``.json`` files that hold one object without a text.

    Raises:
        UserError: a folder cannot be listed, or no file is left.
    """
    files, left_out = _walk(folder)
    taken: dict[str, Path] = {}
    for path in files:  # those reached through links come last
        if not is_corpus_file(path):
            left_out.setdefault("of unknown kind", []).append(path)
        elif is_metadata(path):
            left_out.setdefault(".json without a text", []).append(path)
        elif taken.setdefault(os.path.realpath(path), path) != path:
            left_out.setdefault("reached twice through links", []).append(path)
    unknown = [path for path in left_out.pop("of unknown kind", []) if os.path.realpath(path) not in taken]
    left_out |= {"of unknown kind": unknown} if unknown else {}  # but a link may have given one a name that is known
    listed = _describe(left_out, folder)
    require(len(taken) > 0, f"input {folder} is a folder without data ({KNOWN}{f'; {listed}' if listed else ''})")
    if listed:
        _log.info("input %s: %s", folder, listed)
    return sorted(taken.values())


def _walk(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return all files, linked ones last, and by reason what is none or is not looked at."""
    files, linked, left_out = [], [], {}
    pending, seen = deque([folder]), set()
    while pending:
        here = pending.popleft()
        real = os.path.realpath(here)
        if real in seen:  # a circle, or a second way to the same files
            left_out.setdefault("reached twice through links", []).append(here)
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"input {here} cannot be listed: {reason(error)}") from error
        for entry in entries:
            path, link = here / entry.name, entry.is_symlink()
            if entry.name.startswith("."):
                left_out.setdefault("hidden", []).append(path)
            elif os.path.isdir(path):
                (pending.append if link else pending.appendleft)(path)
            elif os.path.isfile(path):
                (linked if link else files).append(path)
            else:
                kind = "broken links" if link else "neither files nor folders"
                left_out.setdefault(kind, []).append(path)
    return [*files, *linked], left_out


def _describe(left_out: dict[str, list[Path]], folder: Path) -> str:
    parts = []
    for why, paths in left_out.items():
        names = [str(path.relative_to(folder)) for path in sorted(paths)]
        listed = ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
        parts.append(f"{len(names)} {why} ({listed})")
    return f"left out: {', '.join(parts)}" if parts else ""

"""Paths that may lie in a bucket: ``gs://`` and local folders behind one interface."""

from pathlib import Path
from typing import cast

from mor_jax.errors import UserError


def to_path(name: str | Path) -> Path:
    """Return a local path, or for ``gs://...`` a path of the same interface that reads and writes the bucket.

    Raises:
        UserError: a URL of another kind, or gcsfs, which reads buckets, is not installed.
    """
    text = str(name)
    if "://" not in text:
        return Path(text)
    if not text.startswith("gs://"):
        raise UserError(f"{text!r} is neither a local path nor gs://BUCKET/...")
    import fsspec  # slow to import, and most paths are local
    from etils import epath

    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError as error:
        raise UserError(f"{text!r} needs gcsfs: pip install -e '.[gcs]'") from error
    return cast(Path, epath.Path(text))  # the same methods, but not a subclass


def is_remote(path: Path) -> bool:
    """Whether a path of ``to_path`` lies in a bucket, where files cannot be appended to or renamed at once."""
    return not isinstance(path, Path)

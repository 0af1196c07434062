"""A prepared corpus in a bucket, copied to the local disk: ArrayRecord files are read at random, row by row."""

import fcntl
import hashlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mor_jax.data.files import replacing
from mor_jax.data.manifest import MANIFEST, TOKENIZER, read_manifest
from mor_jax.data.special_tokens import RECORD
from mor_jax.errors import UserError, reason
from mor_jax.paths import is_remote, to_path

_log = logging.getLogger(__name__)
_THREADS = 8


def local_copy(name: str, cache: Path) -> Path:
    """Return the folder of a prepared corpus, copied into the cache first if it lies in a bucket.

    A copy that was interrupted is gone on with; one whose manifest is the bucket's is used as it is.

    Args:
        name: of ``data.source``: a folder, or ``gs://...``.
        cache: local folder of ``data.cache``.

    Raises:
        UserError: the bucket holds no corpus there, or cannot be read.
    """
    source = to_path(name)
    if not is_remote(source):
        return source
    try:
        manifest = (source / MANIFEST).read_text(encoding="utf-8")
    except Exception as error:  # the client of the bucket raises kinds of its own
        raise UserError(f"data.source={name!r} has no readable {MANIFEST} ({reason(error)})") from error
    identity = hashlib.sha256(manifest.encode()).hexdigest()[:12]
    target = cache / f"{source.name}-{identity}"
    if target.is_dir():
        return target
    part = target.with_name(target.name + ".partial")
    part.mkdir(parents=True, exist_ok=True)
    with (cache / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():  # else another process copied it while this one waited
            _copy(source, part, manifest)
            part.rename(target)
    return target


def _copy(source: Path, part: Path, manifest: str) -> None:
    (part / MANIFEST).write_text(manifest, encoding="utf-8")
    sizes = {shard.file: shard.size for shard in read_manifest(part).shards}
    missing = [name for name, size in sizes.items() if not _has(part / name, size)]
    _log.info("copying %d of %d shards of %s to %s", len(missing), len(sizes), source, part)

    def copy(name: str) -> None:
        with replacing(part / name) as temporary, (source / name).open("rb") as old, temporary.open("wb") as new:
            shutil.copyfileobj(old, new, 1 << 22)

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(copy, [*missing, TOKENIZER, *([RECORD] if (source / RECORD).is_file() else [])]))
    except Exception as error:  # of the bucket's client, or of the disk
        raise UserError(f"data.source={str(source)!r} could not be copied to {part}: {reason(error)}") from error


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size

"""Second pass of ``prepare``: one bucket of documents becomes one ArrayRecord shard of packed rows."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mor_jax.config import Packing
from mor_jax.config import io as config_io
from mor_jax.data.files import file_hash, replacing
from mor_jax.data.manifest import TOKENIZER, Shard, Split, count_rows
from mor_jax.data.packing import Row, encode_row, pack
from mor_jax.data.spill import read_bucket
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class ShardJob:
    """What a worker needs to make one shard: the folder, the bucket, and how to pack it."""

    folder: Path
    bucket: Path
    split: Split
    file: str
    row_length: int
    packing: Packing

    def finished(self) -> Shard | None:
        """Return the shard that an earlier run finished, or None."""
        path = self.folder / self.file
        if not (_record_path(path).is_file() and path.is_file()):
            return None
        shard = config_io.load(Shard, _record_path(path))
        return shard if path.stat().st_size == shard.size else None


def run_jobs(jobs: Sequence[ShardJob], workers: int, report: Callable[[], None]) -> list[Shard]:
    """Make the shards that are not finished yet.

    Args:
        jobs: one for each shard.
        workers: processes; 0 works in this one (where the tokenizer uses threads of its own).
        report: called after each shard.

    Returns:
        The shards, in the order of the jobs.
    """
    shards = {job.file: shard for job in jobs if (shard := job.finished()) is not None}
    for _ in shards:
        report()
    missing = [job for job in jobs if job.file not in shards]
    for shard in _make_all(missing, min(workers, len(missing))):
        shards[shard.file] = shard
        report()
    return [shards[job.file] for job in jobs]


def _make_all(jobs: Sequence[ShardJob], workers: int) -> Iterator[Shard]:
    if workers == 0:
        yield from map(make_shard, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        futures = [pool.submit(make_shard, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def make_shard(job: ShardJob) -> Shard:
    """Tokenise, pack and write one shard; its record, written last, is what makes it finished."""
    tokenizer = Tokenizer.load(job.folder / TOKENIZER)
    texts = read_bucket(job.bucket)
    documents = list(_encode(tokenizer, texts))
    path = job.folder / job.file
    with replacing(path) as temporary:
        rows = _write_rows(temporary, pack(documents, job.row_length, job.packing))
    shard = Shard(
        file=job.file,
        split=job.split,
        rows=rows,
        documents=len(documents),
        tokens=sum(len(document) for document in documents),
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        size=path.stat().st_size,
        sha256=file_hash(path),
    )
    with replacing(_record_path(path)) as temporary:
        config_io.save(shard, temporary)
    return shard


def remove_records(folder: Path) -> None:
    """Delete the records of finished shards once the manifest holds them."""
    for record in folder.glob("*.shard.json"):
        record.unlink()


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".shard.json")


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    batch: list[str] = []
    size = 0
    for i, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or i == len(texts) - 1:
            yield from tokenizer.encode_documents(batch)
            batch, size = [], 0


def _write_rows(path: Path, rows: Iterator[Row]) -> int:
    path.unlink(missing_ok=True)
    path.touch()  # an unwritable folder raises OSError here; the extension's own message names no cause
    count = 0
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(encode_row(row))
            count += 1
        writer.close()
    except UserError:
        raise
    except RuntimeError as error:
        raise OSError(f"writing {path.name} failed ({str(error).partition(';')[0]})") from error
    if count_rows(path) != count:
        raise OSError(f"writing {path.name} failed: not all rows arrived")
    return count

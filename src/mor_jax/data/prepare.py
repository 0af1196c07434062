"""``mor prepare``: text in, deterministic shuffled and packed rows in ArrayRecord shards with a manifest out.

Everything is made in ``OUT.partial`` and renamed to ``OUT`` at the end. After a kill the same command goes on where it
stopped: finished shards are kept. Memory is bounded by one bucket of text (about 32 MiB) per worker.
"""

import fcntl
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mor_jax.config import Packing
from mor_jax.config import io as config_io
from mor_jax.config.checks import require_seed
from mor_jax.data import manifest as manifests
from mor_jax.data import shards, spill
from mor_jax.data.files import replacing
from mor_jax.data.inputs import Source, open_sources, sources_hash
from mor_jax.data.manifest import MANIFEST, TOKENIZER, Manifest, Settings, Split
from mor_jax.data.readers import Document
from mor_jax.data.tokenizer import Tokenizer, parse_spec, spec_identity, train_bpe
from mor_jax.errors import UserError, require

SHARD_BYTES = 32 << 20
_MOST_SHARDS = 1024
_BPE_BYTES = 64 << 20
_VALIDATION_SHARE = 0.05
_SETTINGS = "settings.json"
_BUCKETS = "buckets"
_LOCK = "lock"


def prepare(
    inputs: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bpe:8192",
    context_length: int = 2048,
    packing: Packing = "concat",
    seed: int = 0,
    validation: Sequence[str] = (),
    validation_share: float | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Prepare a corpus, or return at once when ``out`` already holds exactly this one.

    Args:
        inputs: files, folders, ``embedded``, ``docs`` or ``tfds:NAME`` (see ``open_sources``).
        out: folder to make.
        tokenizer: ``bytes``, ``bpe:SIZE`` or the path of a tokenizer.json.
        context_length: tokens of a row, less one.
        packing: ``concat`` or ``best_fit``.
        seed: of the document shuffle and the split.
        validation: inputs that are the held-out split; documents of ``inputs`` with the same text are left out.
        validation_share: share of the documents that is held out, in [0, 1); None is 0.05, or 0 beside ``validation``.
        workers: processes; 0 stays in this one.
        shard_bytes: bytes of text per shard, about.

    Returns:
        ``out``.

    Raises:
        UserError: a bad input or setting, an ``out`` that holds something else or an unfinished preparation with
            other settings, or a disk that cannot be written.
    """
    require(context_length > 0, f"context_length={context_length} must be positive")
    if validation_share is None:
        validation_share = 0.0 if validation else _VALIDATION_SHARE
    require(0 <= validation_share < 1, f"validation_share={validation_share} is outside [0, 1)")
    require(
        not validation or validation_share == 0,
        f"validation_share={validation_share} and validation={list(validation)} both say what is held out: give one",
    )
    require(workers >= 0, f"workers={workers} must not be negative")
    require_seed("seed", seed)
    sources, held_out = open_sources(inputs), open_sources(validation) if validation else []
    settings = Settings(
        inputs=tuple(sorted(source.name for source in sources)),
        source_hash=sources_hash(sources),
        tokenizer=spec_identity(tokenizer),
        context_length=context_length,
        packing=packing,
        seed=seed,
        validation_share=validation_share,
        shards=_shard_count(sources, shard_bytes),
        validation=tuple(sorted(source.name for source in held_out)),
        validation_hash=sources_hash(held_out) if held_out else "",
        validation_shards=_shard_count(held_out, shard_bytes) if held_out else 0,
    )
    try:
        return _prepare(sources, held_out, out, settings, tokenizer, workers)
    except OSError as error:  # of the output: those of inputs are UserErrors already
        raise UserError(f"{out}: {error}; what is finished is kept for the same command") from error


def _shard_count(sources: Sequence[Source], shard_bytes: int) -> int:
    return min(_MOST_SHARDS, max(1, math.ceil(sum(source.size for source in sources) / shard_bytes)))


def _prepare(
    sources: Sequence[Source],
    held_out: Sequence[Source],
    out: Path,
    settings: Settings,
    tokenizer: str,
    workers: int,
) -> Path:
    if _is_prepared(out, settings):
        return out
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial / _LOCK), _progress() as progress:
        if _is_prepared(out, settings):  # another process made it while this one waited
            shutil.rmtree(partial, ignore_errors=True)
            return out
        _begin(partial, settings)
        try:
            _deal(sources, held_out, partial, settings, progress)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # an input is bad: there is nothing to go on with
            raise
        _make_tokenizer(partial, tokenizer)
        jobs = _jobs(partial, settings)
        task = progress.add_task("tokenise and pack", total=len(jobs))
        made = shards.run_jobs(jobs, workers, lambda: progress.advance(task))
        manifest = Manifest.create(settings, Tokenizer.load(partial / TOKENIZER), made)
        with replacing(partial / MANIFEST) as temporary:
            config_io.save(manifest, temporary)
        _finish(partial, out)
    return out


def _is_prepared(out: Path, settings: Settings) -> bool:
    if not out.exists():
        return False
    require(out.is_dir(), f"out={str(out)!r} exists and is not a folder")
    if not (out / MANIFEST).is_file():
        require(not any(out.iterdir()), f"out={str(out)!r} holds files but no {MANIFEST}; name a new folder")
        return False
    differences = config_io.differences(manifests.read_manifest(out).settings, settings)
    listed = "; ".join(differences)
    require(not differences, f"out={str(out)!r} was prepared otherwise ({listed}); name a new folder or delete it")
    return True


def _finish(partial: Path, out: Path) -> None:
    buckets = partial / _BUCKETS
    shutil.rmtree(buckets.rename(buckets.with_name(_BUCKETS + ".tmp")))  # never half the buckets under their name
    shards.remove_records(partial)
    for name in (_SETTINGS, _LOCK):
        (partial / name).unlink()
    partial.rename(out)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _begin(partial: Path, settings: Settings) -> None:
    path = partial / _SETTINGS
    if not (partial / _BUCKETS).is_dir():  # without the text nothing that is left here can be gone on with
        partial.mkdir(exist_ok=True)
        for entry in partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        with replacing(path) as temporary:
            config_io.save(settings, temporary)
    differences = config_io.differences(config_io.load(Settings, path), settings)
    listed = "; ".join(differences)
    rule = "run the earlier command again, or delete that folder"
    require(not differences, f"{partial} holds an unfinished preparation with other settings ({listed}); {rule}")


def _deal(
    sources: Sequence[Source], held_out: Sequence[Source], partial: Path, settings: Settings, progress: Progress
) -> None:
    if (partial / _BUCKETS).is_dir():
        return
    task = progress.add_task("read", total=len(sources))

    def documents() -> Iterable[Document]:
        progress.reset(task)
        for source in sources:
            yield from source.documents()
            progress.advance(task)

    spill.deal(
        documents,
        (document for source in held_out for document in source.documents()) if held_out else None,
        partial / _BUCKETS,
        seed=settings.seed,
        validation_share=settings.validation_share,
        train_buckets=settings.shards,
        validation_buckets=_validation_shards(settings),
    )


def _validation_shards(settings: Settings) -> int:
    return settings.validation_shards or max(1, math.ceil(settings.shards * settings.validation_share))


def _make_tokenizer(partial: Path, spec: str) -> None:
    path = partial / TOKENIZER
    if path.is_file():
        return
    kind, value = parse_spec(spec)
    if isinstance(value, Path):
        tokenizer = Tokenizer.load(value)
    else:
        tokenizer = train_bpe(_training_texts(partial), value) if kind == "bpe" and value else Tokenizer.bytes_level()
    with replacing(path) as temporary:
        tokenizer.save(temporary)


def _training_texts(partial: Path) -> Iterator[str]:
    """Yield train documents until they hold 64 MiB: buckets are random samples of the corpus."""
    size = 0
    for bucket in sorted((partial / _BUCKETS).glob("train-*")):
        for text in spill.read_bucket(bucket):
            yield text
            size += len(text.encode("utf-8"))
            if size >= _BPE_BYTES:
                return


def _jobs(partial: Path, settings: Settings) -> list[shards.ShardJob]:
    counts: dict[Split, int] = {"train": settings.shards, "validation": _validation_shards(settings)}
    return [
        shards.ShardJob(
            folder=partial,
            bucket=partial / _BUCKETS / f"{split}-{index:05d}",
            split=split,
            file=f"{split}-{index:05d}-of-{count:05d}.array_record",
            row_length=settings.context_length + 1,
            packing=settings.packing,
        )
        for split, count in counts.items()
        for index in range(count)
        if (partial / _BUCKETS / f"{split}-{index:05d}").is_file()
    ]


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)

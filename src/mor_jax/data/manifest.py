"""The manifest of a prepared corpus: what it was made from, what its shards hold, and how to check that they do."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from array_record.python.array_record_module import ArrayRecordReader

from mor_jax.config import Packing
from mor_jax.config import io as config_io
from mor_jax.data.files import file_hash
from mor_jax.data.packing import RECORD_FORMAT
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, reason, require, shown

Split = Literal["train", "validation"]
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides the content of a prepared corpus."""

    inputs: tuple[str, ...]
    """Names of the inputs."""
    source_hash: str
    """SHA-256 over the inputs' hashes."""
    tokenizer: str
    """`bytes`, `bpe:SIZE`, or the SHA-256 of the tokenizer.json that was given."""
    context_length: int
    """Rows have one token more."""
    packing: Packing
    """`concat`: documents joined and cut; `best_fit`: whole documents, padded rows."""
    seed: int
    """Seed of the document shuffle and the split."""
    validation_share: float
    """Share of the documents that is held out."""
    shards: int
    """Shards that the documents are dealt to, per split at most."""
    validation: tuple[str, ...] = ()
    """Names of the inputs that are the held-out split; without any, a share of the others is."""
    validation_hash: str = ""
    """SHA-256 over their hashes."""
    validation_shards: int = 0
    """Shards that they are dealt to."""


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file."""

    file: str
    split: Split
    rows: int
    documents: int
    tokens: int
    """Tokens in the rows, end-of-text tokens included, padding not."""
    text_bytes: int
    """Bytes of UTF-8 text."""
    size: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True)
class SplitTotals:
    """Sums over the shards of one split."""

    split: Split
    rows: int
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    """Mean bytes of text per token, end-of-text tokens counted as tokens."""


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    format: int
    settings: Settings
    record: str
    """What one record of a shard holds."""
    tokenizer_hash: str
    vocab_size: int
    splits: tuple[SplitTotals, ...]
    shards: tuple[Shard, ...]
    hash: str
    """Content hash of the corpus: over the shards' hashes and the tokenizer's."""

    @classmethod
    def create(cls, settings: Settings, tokenizer: Tokenizer, shards: Sequence[Shard]) -> "Manifest":
        """Sum up finished shards."""
        return cls(
            format=_FORMAT,
            settings=settings,
            record=RECORD_FORMAT,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            splits=_totals(shards),
            shards=tuple(shards),
            hash=_content_hash(tokenizer.hash, shards),
        )

    def of(self, split: Split) -> tuple[Shard, ...]:
        """Return the shards of a split."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def totals(self, split: Split) -> SplitTotals | None:
        """Return the sums of a split, or None when the corpus has none."""
        return next((totals for totals in self.splits if totals.split == split), None)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared corpus and check that it agrees with itself.

    Raises:
        UserError: the folder is no prepared corpus, or its manifest is damaged or of another format.
    """
    require(folder.is_dir(), f"data.source={str(folder)!r}: no such folder")
    require(
        (folder / MANIFEST).is_file(),
        f"data.source={str(folder)!r} has no {MANIFEST}: it is not a prepared corpus (make one with `mor prepare`)",
    )
    manifest = config_io.load(Manifest, folder / MANIFEST)
    where = folder / MANIFEST
    require(manifest.format == _FORMAT, f"{where}: format={manifest.format} is not {_FORMAT}: prepare the corpus again")
    for shard in manifest.shards:  # it may come from a bucket, whose files are copied to these names
        require(Path(shard.file).name == shard.file, f"{where}: shard {shown(shard.file)} is no plain file name")
    agrees = manifest.splits == _totals(manifest.shards)
    agrees = agrees and manifest.hash == _content_hash(manifest.tokenizer_hash, manifest.shards)
    require(agrees, f"{where}: its totals or hash disagree with its list of shards; it was changed after `mor prepare`")
    return manifest


def check_shards(folder: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Check the files of a prepared corpus against its manifest.

    Args:
        folder: the prepared corpus.
        manifest: its manifest.
        full: also read every file and compare its SHA-256; otherwise only sizes and numbers of rows.

    Raises:
        UserError: a file is missing or disagrees, with its name and the numbers.
    """
    for shard in manifest.shards:
        path = folder / shard.file
        require(path.is_file(), f"{path} is missing, but {MANIFEST} lists it")
        size = path.stat().st_size
        require(size == shard.size, f"{path} has {size} bytes, but {MANIFEST} says {shard.size}")
        rows = count_rows(path)
        require(rows == shard.rows, f"{path} has {rows} rows, but {MANIFEST} says {shard.rows}")
        require(not full or file_hash(path) == shard.sha256, f"{path} has another SHA-256 than {MANIFEST} says")


def count_rows(path: Path) -> int:
    """Return the number of records of an ArrayRecord file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except Exception as error:  # the extension maps every status to a kind of its own
        words = reason(error).partition(";")[0]
        raise UserError(f"{path} is truncated or not an ArrayRecord file ({words})") from error


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Read the tokenizer of a prepared corpus.

    Raises:
        UserError: it is missing, or not the one that the corpus was made with.
    """
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    agrees = tokenizer.hash == manifest.tokenizer_hash and tokenizer.vocab_size == manifest.vocab_size
    require(agrees, f"{folder / TOKENIZER} is not the tokenizer that {MANIFEST} names; prepare the corpus again")
    return tokenizer


def _totals(shards: Sequence[Shard]) -> tuple[SplitTotals, ...]:
    totals = []
    for split in get_args(Split):
        mine = [shard for shard in shards if shard.split == split]
        if mine:
            tokens, text_bytes = sum(s.tokens for s in mine), sum(s.text_bytes for s in mine)
            rows, documents = sum(s.rows for s in mine), sum(s.documents for s in mine)
            totals.append(SplitTotals(split, rows, documents, tokens, text_bytes, text_bytes / max(1, tokens)))
    return tuple(totals)


def _content_hash(tokenizer_hash: str, shards: Sequence[Shard]) -> str:
    lines = [tokenizer_hash, *(f"{shard.split} {shard.sha256}" for shard in shards)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

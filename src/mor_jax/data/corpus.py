"""Prepared corpora: opened and checked, and prepared where ``data.source`` names something to prepare."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mor_jax.config import DataConfig
from mor_jax.data.inputs import BUILTIN_PREFIX, TFDS_PREFIX, is_made_here, open_sources, source_names, sources_hash
from mor_jax.data.manifest import TOKENIZER, Manifest, Split, check_shards, load_tokenizer, read_manifest
from mor_jax.data.prepare import prepare
from mor_jax.data.remote import local_copy
from mor_jax.data.tokenizer import Tokenizer, parse_spec, spec_identity
from mor_jax.errors import require

_log = logging.getLogger(__name__)
_VALIDATION_SHARE = 0.12


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus whose files agree with its manifest."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def paths(self, split: Split) -> list[str]:
        """Return the shard files of a split.

        Raises:
            UserError: the corpus has no such split.
        """
        shards = self.manifest.of(split)
        require(
            len(shards) > 0,
            f"data.source={str(self.folder)!r} has no {split} split (validation_share="
            f"{self.manifest.settings.validation_share})",
        )
        return [str(self.folder / shard.file) for shard in shards]


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder after checking that manifest, tokenizer and shards agree.

    Raises:
        UserError: they don't, or the folder is no prepared corpus.
    """
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    return Corpus(folder, manifest, load_tokenizer(folder, manifest))


def open_corpora(config: DataConfig, context_length: int, vocab_size: int) -> list[Corpus]:
    """Open every corpus that ``config.source`` names; ``embedded``, ``docs`` and ``tfds:`` are prepared once.

    Args:
        config: ``source`` (several joined by commas), ``tokenizer``, ``cache``, ``seed``.
        context_length: the model's; prepared rows may hold a multiple of it.
        vocab_size: the model's; the size that ``tokenizer='auto'`` trains for.

    Raises:
        UserError: a source that cannot be used, rows that do not fit the context length, or vocabularies that differ.
    """
    names = source_names(config.source)
    count = len(config.weights or names)
    rule = f"has not one entry for each of {len(names)} sources"
    require(count == len(names), f"data.weights={config.weights} {rule}")
    ready = {name: open_corpus(local_copy(name, Path(config.cache))) for name in names if not is_made_here(name)}
    spec = config.tokenizer
    if spec == "auto":
        first = next(iter(ready.values()), None)
        spec = f"bpe:{vocab_size}" if first is None else str(first.folder / TOKENIZER)
    for name in names:
        if name not in ready:
            ready[name] = open_corpus(_prepare_in_cache(name, config, spec, context_length))
    corpora = [ready[name] for name in names]
    _check_tokenizers(corpora, config.tokenizer, vocab_size)
    for corpus in corpora:
        _check_context(corpus, context_length)
    return corpora


def _prepare_in_cache(name: str, config: DataConfig, spec: str, context_length: int) -> Path:
    bare = name.removeprefix(BUILTIN_PREFIX)
    source = name if name.startswith(TFDS_PREFIX) else BUILTIN_PREFIX + bare  # a saved `docs` is never a folder
    identity = json.dumps([sources_hash(open_sources([source])), spec_identity(spec), context_length])
    label = "".join(character if character.isalnum() else "-" for character in bare)
    folder = Path(config.cache) / f"{label}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return prepare(
        [source],
        folder,
        tokenizer=spec,
        context_length=context_length,
        validation_share=_VALIDATION_SHARE,
    )


def _check_tokenizers(corpora: Sequence[Corpus], spec: str, vocab_size: int) -> None:
    first = corpora[0]
    for corpus in corpora:
        require(
            corpus.tokenizer.hash == first.tokenizer.hash,
            f"data.source: {corpus.folder} and {first.folder} were prepared with different tokenizers",
        )
        same = corpus.tokenizer.encode_documents([""])[0].tolist() == first.tokenizer.encode_documents([""])[0].tolist()
        require(same, f"data.source: {corpus.folder} and {first.folder} put other special tokens around documents")
    size, where = first.tokenizer.vocab_size, f"the tokenizer of {first.folder}"
    fix = f"set model.vocab_size={size} or more, or prepare anew"
    require(size <= vocab_size, f"model.vocab_size={vocab_size} is less than the {size} of {where}; {fix}")
    if size < vocab_size:
        _log.info("model.vocab_size=%d pads the %d tokens of %s", vocab_size, size, where)
    if spec != "auto":
        require(_is_spec_of(spec, first), f"data.tokenizer={spec!r} is not {where}; leave it 'auto'")


def _is_spec_of(spec: str, corpus: Corpus) -> bool:
    _, value = parse_spec(spec)
    if isinstance(value, Path):
        return Tokenizer.load(value).hash == corpus.tokenizer.hash
    return spec == corpus.manifest.settings.tokenizer


def _check_context(corpus: Corpus, context_length: int) -> None:
    stored = corpus.manifest.settings.context_length
    field = f"model.context_length={context_length}"
    where = f"{stored} tokens of the rows in {corpus.folder}; prepare them anew"
    require(context_length <= stored, f"{field} is longer than the {where}")
    require(stored % context_length == 0, f"{field} does not divide the {where}")

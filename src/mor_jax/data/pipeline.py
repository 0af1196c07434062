"""Batches of packed rows: a pure Grain MapDataset whose whole state is one integer, the next step."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np

from mor_jax.config import DataConfig
from mor_jax.data.corpus import Corpus, open_corpora
from mor_jax.data.manifest import Split, SplitTotals
from mor_jax.data.packed_rows import PaddedSource, RowsOfBatches, RowSource
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require

_log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
_READ_THREADS = 4
_READ_AHEAD = 16
_ENDLESS = 1 << 48  # rows; Grain's own endless repeat overflows in len() of small batches


class NoHeldOutText(UserError):
    """None of the corpora holds out a part for validation."""


class Dataset:
    """An iterator over batches; batch number ``k`` is a pure function of the configuration and ``k``.

    Made by ``make_dataset``, or of a Grain MapDataset of one's own. Each batch is ``{"tokens", "segment_ids",
    "positions"}``, int32 ``[rows, context_length + 1]``: segment ids are 1-based (0 = padding), positions restart with
    every document. Rows of one's own may add, in the same shape, ``labels`` (see ``model.loss.batch_labels``) and
    ``difficulty``, which only their own evaluation reads.

    Args:
        batches: a Grain MapDataset of batches.
        step: number of the next batch: the whole state. Assigning it moves there.
        steps: batches of a finite pass (validation), or None (train).
        workers: Grain worker processes.
        tokenizer: of the rows.
        content_hash: of what the rows are made from; a run refuses to go on with another.
        rows: rows of the split over all corpora.
        bytes_per_token: mean bytes of text per token (in a mixture, of its weighted rows).

    Attributes:
        hash: ``content_hash``; the others are called like the arguments.
    """

    def __init__(
        self,
        batches: Any,
        *,
        step: int,
        steps: int | None,
        workers: int,
        tokenizer: Tokenizer,
        content_hash: str,
        rows: int,
        bytes_per_token: float,
    ) -> None:
        self._batches = batches
        self._workers = workers
        self._iterator: Iterator[Batch] | None = None
        self._step = step
        self.steps = steps
        self.rows = rows
        self.tokenizer = tokenizer
        self.bytes_per_token = bytes_per_token
        self.hash = content_hash

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        require(step >= 0, f"data step={step} must not be negative")
        self.close()
        self._step = step

    def __iter__(self) -> "Dataset":
        return self

    def __next__(self) -> Batch:
        if self.steps is not None and self._step >= self.steps:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._step += 1
        return {name: np.array(values) for name, values in batch.items()} if self._workers else batch

    def batch(self, step: int) -> Batch:
        """Return batch number ``step`` without moving."""
        return self._batches[step]

    def close(self) -> None:
        """Stop the reading threads and worker processes; the next ``next`` starts them again."""
        if self._iterator is not None:
            cast(Any, self._iterator).close()
            self._iterator = None

    def _start(self) -> Iterator[Batch]:
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
        batches = self._batches[self._step :].to_iter_dataset(options)
        if self._workers:
            _allow_worker_processes()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(batches)


def make_dataset(
    config: DataConfig,
    *,
    split: Split = "train",
    context_length: int,
    vocab_size: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> Dataset:
    """Open the batches that a configuration describes.

    ``train`` is endless and shuffled anew every epoch; ``validation`` is one pass in stored order (of a mixture: one
    corpus after the other), its last batch filled with padding rows. A batch is the same whatever ``config.workers``,
    and whatever hosts read it: each reads only its ``rows``.

    Args:
        config: sources, weights, tokenizer, cache, seed, workers.
        split: ``train`` or ``validation``.
        context_length: tokens of a model input; rows have one more. Must divide the context length of the stored rows.
        vocab_size: the model's; at least the tokenizer's.
        batch_size: rows per step over all hosts.
        rows: which rows of every batch to read, such as ``parallel.local_rows``; None reads all.
        start_step: first batch to give.

    Returns:
        The batches, with the tokenizer and the corpora's facts.

    Raises:
        NoHeldOutText: ``validation`` of corpora that have none.
        UserError: a source that cannot be used, shards that disagree with their manifest, rows that do not fit the
            context length, vocabularies that differ, or ``rows`` outside the batch.
    """
    if split not in ("train", "validation"):
        raise UserError(f"split={split!r} is not 'train' or 'validation'")
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    require(start_step >= 0, f"start_step={start_step} must not be negative")
    mine = list(range(batch_size)) if rows is None else list(rows)
    inside = bool(mine) and min(mine) >= 0 and max(mine) < batch_size
    require(inside, f"rows={mine} are outside batch_size={batch_size}, or none")
    corpora = open_corpora(config, context_length, vocab_size)
    if split == "validation":
        corpora = _with_validation(corpora, config.source)
    sources = [_rows(corpus, split, context_length) for corpus in corpora]
    total = sum(len(source) for source in sources)
    weights = list(config.weights or [len(source) for source in sources])
    if split == "train":
        steps, dataset = None, _endless(sources, weights, config.seed)
    else:
        steps, weights = -(-total // batch_size), [len(source) for source in sources]
        dataset = grain.MapDataset.source(PaddedSource(sources, steps * batch_size, context_length + 1))
    if mine != list(range(batch_size)):
        dataset = grain.MapDataset.source(RowsOfBatches(dataset, batch_size, mine))
    return Dataset(
        dataset.batch(len(mine)),
        step=start_step,
        steps=steps,
        workers=config.workers,
        tokenizer=corpora[0].tokenizer,
        content_hash=",".join(corpus.manifest.hash for corpus in corpora),
        rows=total,
        bytes_per_token=_bytes_per_token(corpora, split, weights),
    )


def _with_validation(corpora: list[Corpus], source: str) -> list[Corpus]:
    found = [corpus for corpus in corpora if corpus.manifest.of("validation")]
    if not found:
        raise NoHeldOutText(f"data.source={source!r} has no validation split: it was prepared with validation_share=0")
    for corpus in corpora:
        if corpus not in found:
            _log.info("%s has no validation split: the others are measured", corpus.folder)
    return found


def _rows(corpus: Corpus, split: Split, context_length: int) -> RowSource:
    return RowSource(corpus.paths(split), corpus.manifest.settings.context_length, context_length)


def _endless(sources: Sequence[RowSource], weights: Sequence[float], seed: int) -> Any:
    shuffled = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat(_ENDLESS // len(source))
        for i, source in enumerate(sources)
    ]
    if len(shuffled) == 1:
        return shuffled[0]
    return grain.MapDataset.mix(shuffled, [weight / sum(weights) for weight in weights])


def _bytes_per_token(corpora: Sequence[Corpus], split: Split, weights: Sequence[float]) -> float:
    totals = [cast(SplitTotals, corpus.manifest.totals(split)) for corpus in corpora]
    tokens = [weight * t.tokens / t.rows for weight, t in zip(weights, totals, strict=True)]
    mean = sum(n * t.bytes_per_token for n, t in zip(tokens, totals, strict=True))
    return mean / sum(tokens)


def _allow_worker_processes() -> None:
    """Mark absl's flags as parsed where no absl app did: Grain's worker processes read them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

"""Rows of questions as batches for training: unlimited, by index, so that a resumed run meets the same ones.

A run's ``data.source`` is ``reasoning:TASK``, such as ``reasoning:pointer-8``; its ``data.seed`` makes other rows.
"""

import json
from collections.abc import Sequence
from typing import Literal

import grain
import numpy as np
from tasks import END, ID, UNKNOWN, WORDS, Task, task_of

from mor_jax.config import DataConfig
from mor_jax.data.pipeline import Dataset
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.model.loss import IGNORED

PREFIX = "reasoning:"
Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")
HELD_OUT_ROWS = 1 << 14
"""Rows of a pass over the held-out part."""
_ENDLESS = 1 << 40


def tokenizer() -> Tokenizer:
    """Return the tokenizer of the tasks' vocabulary: words between blanks."""
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": ID[END], "content": END, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": ID, "unk_token": UNKNOWN},
    }
    return Tokenizer(json.dumps(definition))


class QuestionBatches:
    """Batches of one part of a task by index (a Grain ``RandomAccessDataSource``): made at once, for speed.

    Args:
        task: of ``task_of``.
        part: of PARTS.
        seed: of the rows.
        batch_size: rows of a batch over all hosts; other sizes are other rows.
        mine: which rows of a batch to give.
    """

    def __init__(self, task: Task, part: Part, seed: int, batch_size: int, mine: Sequence[int]) -> None:
        self._task, self._part, self._seed = task, part, seed
        self._batch_size, self._mine = batch_size, list(mine)

    def __len__(self) -> int:
        return _ENDLESS if self._part == "train" else HELD_OUT_ROWS // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((self._seed, PARTS.index(self._part), index))
        tokens, answers, difficulties = self._task.rows(generator, self._batch_size, self._part != "train")
        answered = np.where(difficulties > 0, answers, IGNORED)
        arrays = {
            "tokens": np.pad(tokens, ((0, 0), (0, 1)), constant_values=ID[END]),  # stands for no input
            "segment_ids": np.ones((self._batch_size, tokens.shape[1] + 1)),
            "positions": np.tile(np.arange(tokens.shape[1] + 1), (self._batch_size, 1)),
            "labels": np.pad(answered, ((0, 0), (1, 0)), constant_values=IGNORED),
            "difficulty": np.pad(difficulties, ((0, 0), (1, 0))),
        }
        return {name: values[self._mine].astype(np.int32) for name, values in arrays.items()}


def make_dataset(
    config: DataConfig,
    *,
    split: Part = "train",
    context_length: int,
    vocab_size: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Dataset:
    """Open the batches of a task, as ``mor_jax.data.pipeline.make_dataset`` opens those of a corpus.

    Args:
        config: source and seed; the held-out parts are the same for every seed.
        split: ``train`` is endless; ``validation`` is one pass over rows that it never makes.
        context_length: the task's ``row_length``.
        vocab_size: at least the vocabulary's.
        batch_size: rows per step over all hosts; divides the held-out rows.
        rows: which rows of every batch to make; None is all.

    Raises:
        UserError: a source that names no task, or sizes that do not fit.
    """
    require(config.source.startswith(PREFIX), f"data.source={config.source!r} does not begin with {PREFIX!r}")
    try:
        task = task_of(config.source.removeprefix(PREFIX))
    except ValueError as error:
        raise UserError(f"data.source={config.source!r}: {error}") from error
    length = task.row_length
    require(context_length == length, f"model.context_length={context_length} must be {length} for {config.source!r}")
    require(vocab_size >= len(WORDS), f"model.vocab_size={vocab_size} is below the {len(WORDS)} words of the tasks")
    whole = split == "train" or HELD_OUT_ROWS % batch_size == 0
    require(whole, f"{HELD_OUT_ROWS} held-out rows are no whole batches of {batch_size}")
    seed = config.seed if split == "train" else 0
    mine = range(batch_size) if rows is None else rows
    batches = QuestionBatches(task, split, seed, batch_size, mine)
    return Dataset(
        grain.MapDataset.source(batches),
        step=0,
        steps=None if split == "train" else len(batches),
        workers=config.workers,
        tokenizer=tokenizer(),
        content_hash=config.source,
        rows=HELD_OUT_ROWS,
        bytes_per_token=1.0,
    )

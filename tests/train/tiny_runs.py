"""Runs small enough for tests: a two-recursion model and a data set made of random numbers."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerfConfig,
    RecursionConfig,
    RoutingConfig,
    TrainConfig,
)

TIMINGS = ("tokens_per_second", "data_wait_seconds", "goodput", "mfu")
"""Entries of metrics.jsonl that say how fast a run was, not what it computed."""


def tiny_config(runs: Path | None = None, routing: RoutingConfig | None = None, **train: Any) -> Config:
    """A float32 model of two layers applied twice, rows of 32 tokens."""
    return Config(
        model=ModelConfig(
            vocab_size=64,
            num_layers=4,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_ff=64,
            context_length=32,
            attend_across_documents=False,
            dtype="float32",
            recursion=RecursionConfig(num_recursions=2, sharing="cycle"),
            routing=routing or RoutingConfig(kind="expert"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**{**_TRAIN, "runs": str(runs or "unused"), **train}),
        perf=PerfConfig(loss_chunk=16),
    )


_TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 0,
    "eval_rows": 4,
    "save_every": 3,
    "name": "tiny",
    "trackers": (),
    "pictures": False,  # a program and a page more for every run
}


def with_train(config: Config, **changes: Any) -> Config:
    """The configuration with other fields of ``train``."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def make_batch(config: Config, step: int = 0, rows: int | None = None) -> dict[str, np.ndarray]:
    """Rows of two documents and some padding, a function of the step alone."""
    generator = np.random.default_rng(step)
    shape = (rows or config.train.batch_size, config.model.context_length + 1)
    tokens = generator.integers(1, config.model.vocab_size // 4, shape, dtype=np.int32)
    columns = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    border, end = generator.integers(5, 15, (shape[0], 1)), generator.integers(25, 34, (shape[0], 1))
    segment_ids = np.where(columns < border, 1, 2) * (columns < end)
    positions = np.where(columns < border, columns, columns - border)
    return {"tokens": tokens, "segment_ids": segment_ids.astype(np.int32), "positions": positions.astype(np.int32)}


class NumberTokenizer:
    """Spells token 7 as "7 "."""

    vocab_size, eos_id = 64, 0

    def encode(self, text: str) -> list[int]:
        """Read the numbers of a text; what is none has no token."""
        return [int(word) for word in text.split() if word.isdecimal()]

    def decode(self, ids: Sequence[int]) -> str:
        """Join the numbers."""
        return b"".join(self.token_bytes(i) for i in ids).decode()

    def token_bytes(self, token: int) -> bytes:
        """Spell a token."""
        return f"{token} ".encode()

    def save(self, path: Path) -> None:
        """Write the kind."""
        path.write_text(json.dumps({"kind": "numbers"}))


class TinyDataset:
    """Batches that are a function of their step; appends "step row checksum" lines to ``record`` when it is given."""

    def __init__(
        self,
        config: Config,
        split: str,
        batch_size: int,
        record: Path | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._config, self._trains, self._size, self._record = config, split == "train", batch_size, record
        self._rows = list(range(batch_size)) if rows is None else list(rows)
        self.tokenizer, self.bytes_per_token, self.hash = NumberTokenizer(), 2.7, "tiny"
        self.step, self.steps, self.rows = 0, (None if self._trains else 4), 1000

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return this process's rows of the batch of a step."""
        batch = make_batch(self._config, step if self._trains else step + 10**6, self._size)
        return {name: values[self._rows] for name, values in batch.items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.steps is not None and self.step >= self.steps:
            raise StopIteration
        batch = self.batch(self.step)
        if self._record is not None and self._trains:
            with self._record.open("a") as file:
                for place, row in enumerate(self._rows):
                    checksum = zlib.crc32(b"".join(batch[name][place].tobytes() for name in sorted(batch)))
                    file.write(f"{self.step} {row} {checksum}\n")
        self.step += 1
        return batch

    def close(self) -> None:
        """Nothing is open."""


def dataset_maker(config: Config, record: Path | None = None) -> Any:
    """A stand-in for ``data.pipeline.make_dataset``."""

    def make(_: DataConfig, *, split: str, batch_size: int, **rest: Any) -> TinyDataset:
        assert rest["context_length"] == config.model.context_length
        return TinyDataset(config, split, batch_size, record, rest.get("rows"))

    return make


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """What a run measured, without the timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def saved_fingerprints(folder: Path, step: int) -> dict[str, Any]:
    """Fingerprints of every leaf of a checkpoint."""
    path = folder / "checkpoints" / str(step) / "about" / "metadata"
    return json.loads(path.read_text())["leaves"]

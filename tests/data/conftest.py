"""Small texts and prepared corpora shared by the data tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mor_jax.data.prepare import prepare

CONTEXT = 32


def _write_jsonl(path: Path, count: int = 60, word: str = "lorem") -> Path:
    lines = (
        json.dumps({"text": f"{word} document {i} says " + f"{word} ipsum {i} " * (i % 7 + 1)}) for i in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[..., Path]:
    """The function that writes a jsonl file of ``count`` documents."""
    return _write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level corpus of 60 documents in rows of 33 tokens, over several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    text = _write_jsonl(folder / "text.jsonl")
    return prepare(
        [str(text)], folder / "bytes", tokenizer="bytes", context_length=CONTEXT, validation_share=0.2, shard_bytes=1500
    )


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another byte-level corpus, whose texts all hold the word `dolor`."""
    folder = tmp_path_factory.mktemp("other")
    text = _write_jsonl(folder / "text.jsonl", word="dolor")
    return prepare([str(text)], folder / "bytes", tokenizer="bytes", context_length=CONTEXT, validation_share=0.2)

"""Task definitions for lm-eval over local evaluation sets: gzipped JSON lines in a folder, nothing is downloaded.

Names, prompts and scoring follow lm-eval's own tasks of the same names; the sets may be samples of the originals, so a
result names its file and number of rows. Fields: ``query``, ``choices`` and ``gold`` (multiple choice), ``context`` and
``continuation`` (LAMBADA), ``context_options``, ``continuation`` and ``gold`` (WinoGrande), ``text`` (perplexity).
"""

import gzip
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mor_jax.errors import UserError, require, suggest

Doc = Mapping[str, Any]
PAPER_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu")
"""The paper's few-shot and zero-shot set (table 3), by the names that lm-eval uses."""
_LETTERS = "ABCDEFGHIJ"
_CHOICE_FIELDS = ("query", "choices", "gold")


def _question(doc: Doc) -> str:
    return f"Question: {doc['query']}\nAnswer:"


def _lettered(doc: Doc) -> str:
    subject = doc["subject"].replace("_", " ")
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, doc["choices"], strict=False))
    intro = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return f"{intro}{doc['query'].strip()}\n{options}Answer:"


def _yes_no(doc: Doc) -> str:
    return f"{doc['passage']}\nQuestion: {doc['query']}?\nAnswer:".replace("??", "?")


def _multiple_choice(text: Callable[[Doc], str], *, normed: bool, **others: Any) -> dict[str, Any]:
    metrics = ["acc", "acc_norm"] if normed else ["acc"]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": lambda doc: list(doc["choices"]),
        "doc_to_target": lambda doc: doc["gold"],
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        **others,
    }


@dataclass(frozen=True)
class LocalTask:
    """A task and the file that it reads."""

    file: str
    """Name of the gzipped JSON lines."""
    definition: Mapping[str, Any] = field(repr=False)
    """Of lm-eval's ``TaskConfig``, without name and data."""
    fields: tuple[str, ...] = _CHOICE_FIELDS
    """That every line must have."""


TASKS: Mapping[str, LocalTask] = {
    "lambada_openai": LocalTask(
        "lambada_openai.jsonl.gz",
        {
            "output_type": "loglikelihood",
            "doc_to_text": lambda doc: doc["context"],
            "doc_to_target": lambda doc: " " + doc["continuation"],
            "target_delimiter": "",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        ("context", "continuation"),
    ),
    "hellaswag": LocalTask("hellaswag_val.jsonl.gz", _multiple_choice(lambda doc: doc["query"], normed=True)),
    "piqa": LocalTask("piqa_valid.jsonl.gz", _multiple_choice(_question, normed=True)),
    "winogrande": LocalTask(
        "winogrande_dev.jsonl.gz",
        {
            # partial scoring: the same continuation after either context; lm-eval takes the gold index as the text
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["gold"],
            "doc_to_choice": lambda doc: list(doc["context_options"]),
            "doc_to_target": lambda doc: doc["continuation"],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        ("context_options", "continuation", "gold"),
    ),
    "arc_easy": LocalTask("arc_easy_test.jsonl.gz", _multiple_choice(_question, normed=True)),
    "arc_challenge": LocalTask("arc_challenge_test.jsonl.gz", _multiple_choice(_question, normed=True)),
    "mmlu": LocalTask(
        "mmlu_test_sample.jsonl.gz",
        _multiple_choice(_lettered, normed=False, doc_to_choice=lambda doc: list(_LETTERS[: len(doc["choices"])])),
        (*_CHOICE_FIELDS, "subject"),
    ),
    "copa": LocalTask("copa.jsonl.gz", _multiple_choice(lambda doc: doc["query"], normed=False)),
    "boolq": LocalTask("boolq_val.jsonl.gz", _multiple_choice(_yes_no, normed=False), (*_CHOICE_FIELDS, "passage")),
    "wikitext": LocalTask(
        "wikitext2_raw_test.jsonl.gz",
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["text"],
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        ("text",),
    ),
}
"""Local tasks by the names that lm-eval uses."""


def local_task(name: str, folder: Path) -> dict[str, Any]:
    """Return an lm-eval task configuration that reads a local evaluation set.

    Args:
        name: one of ``TASKS``.
        folder: with the gzipped JSON lines.

    Raises:
        UserError: an unknown task, or its file is missing or damaged.
    """
    dataset: Any = importlib.import_module("datasets").Dataset  # comes with lm-eval
    require(name in TASKS, f"--tasks {name!r} is not one of {', '.join(TASKS)}{suggest(name, TASKS)}")
    task = TASKS[name]
    documents = read_set(folder / task.file, task.fields)
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": dataset.from_list(documents)},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **task.definition,
    }


def read_set(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Read a gzipped JSON-lines file.

    Args:
        path: the file.
        fields: that every line must have.

    Raises:
        UserError: it is missing, damaged or empty, or a line is no object with these fields.
    """
    require(path.is_file(), f"{path} is missing: --evalsets names the folder with the evaluation sets")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            documents = [json.loads(line) for line in file if line.strip()]
    except (EOFError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is truncated or not gzipped JSON lines ({error})") from error
    require(len(documents) > 0, f"{path} holds no documents")
    for number, document in enumerate(documents, start=1):
        require(isinstance(document, dict), f"{path}, document {number}: not a JSON object")
        missing = [name for name in fields if name not in document]
        require(not missing, f"{path}, document {number}: {', '.join(missing)} missing")
    return documents

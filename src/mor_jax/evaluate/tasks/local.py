"""Task definitions for lm-eval over local evaluation sets: gzipped JSON lines in a folder, nothing is downloaded.

Names, prompts and scoring follow lm-eval's own tasks of the same names; the sets may be samples of the originals, so a
result names its file and number of rows. Fields: ``query``, ``choices`` and ``gold`` (multiple choice), ``context`` and
``continuation`` (LAMBADA), ``context_options``, ``continuation`` and ``gold`` (WinoGrande), ``text`` (perplexity).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mor_jax.data.readers import json_lines
from mor_jax.errors import UserError, require, suggest

Doc = Mapping[str, Any]
PAPER_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu")
"""The paper's few-shot and zero-shot set (table 3), by the names that lm-eval uses."""
_LETTERS = "ABCDEFGHIJ"
_SHOWN = 60
_LISTS = ("choices", "context_options")
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
    most_choices: int | None = None
    """Choices that a document may have; None is any number."""


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
        most_choices=len(_LETTERS),
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
    documents = read_set(folder / task.file, task.fields, task.most_choices)
    used = [{name: document[name] for name in task.fields} for document in documents]  # others may be of any type
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": dataset.from_list(used)},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **task.definition,
    }


def read_set(path: Path, fields: Sequence[str], most_choices: int | None = None) -> list[dict[str, Any]]:
    """Read a gzipped JSON-lines file.

    Args:
        path: the file.
        fields: that every document must have, with values that can be scored.
        most_choices: choices that a document may have; None is any number.

    Raises:
        UserError: the file is missing, damaged or empty, or a document cannot be scored (names its number).
    """
    require(path.is_file(), f"{path} is missing: --evalsets names the folder with the evaluation sets")
    documents = [document for _, document in json_lines(path, str(path))]
    require(len(documents) > 0, f"{path} holds no documents")
    for number, document in enumerate(documents, start=1):
        _check_document(document, fields, most_choices, f"{path}, document {number}")
    some_text = fields != ("text",) or any(document["text"].strip() for document in documents)
    require(some_text, f"{path} holds no text")
    return documents


def _check_document(document: Doc, fields: Sequence[str], most_choices: int | None, where: str) -> None:
    """Refuse what lm-eval would end with a traceback at, or count as a wrong answer."""
    missing = [name for name in fields if name not in document]
    require(not missing, f"{where}: {', '.join(missing)} missing")
    for name in fields:
        value = document[name]
        if name in _LISTS:
            require(
                isinstance(value, list) and len(value) > 0, f"{where}: {name}={_show(value)} is not a list of texts"
            )
            for nth, choice in enumerate(value):
                _check_text(f"{name}[{nth}]", choice, where)
                require(choice != "", f"{where}: {name}[{nth}] is an empty text")
        elif name != "gold":
            _check_text(name, value, where)
    if "continuation" in fields:
        require(document["continuation"].strip() != "", f"{where}: continuation is an empty text")
    if "gold" in fields:
        gold, count = document["gold"], len(next(document[name] for name in _LISTS if name in fields))
        require(type(gold) is int, f"{where}: gold={_show(gold)} is not an integer")
        require(0 <= gold < count, f"{where}: gold={_show(gold)} is outside 0..{count - 1}, the choices")
        fits = most_choices is None or count <= most_choices
        require(fits, f"{where}: {count} choices are more than the {most_choices} that have a letter")


def _check_text(name: str, value: Any, where: str) -> None:
    require(isinstance(value, str), f"{where}: {name}={_show(value)} is not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} holds half of a surrogate pair at character {error.start}") from error


def _show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

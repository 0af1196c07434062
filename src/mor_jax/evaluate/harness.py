"""lm-eval over a model of this project: causal scores that no other request can change.

Requests are scored under the causal selection (``scoring``). A row is padded at its end to the next power of two, by
its own length alone, so that a request is always computed in a batch of the same shape; padding has segment 0, takes no
seat and cannot be attended to. Rows are split over all devices. References: the Language Model Evaluation Harness.
"""

import importlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.data.packing import Row, expand_row
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require, suggest
from mor_jax.evaluate.scoring import RowScorer, TokenScores
from mor_jax.evaluate.sliding import windows
from mor_jax.evaluate.tasks.local import local_task

try:  # an optional package: without it nothing of it is known to type checkers
    lm_eval: Any = importlib.import_module("lm_eval")
    TemplateLM: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    TaskManager: Any = importlib.import_module("lm_eval.tasks").TaskManager
except ImportError as error:
    raise UserError("--tasks needs the package lm-eval: pip install -e '.[eval]'") from error

_SHORTEST = 32
_DEFAULT_NEW_TOKENS = 128


class MorLM(TemplateLM):
    """A scorer as lm-eval's language model.

    Args:
        scorer: of the model.
        tokenizer: of the model.
        batch_size: rows at a time; rounded up to a multiple of the devices.
    """

    def __init__(self, scorer: RowScorer, tokenizer: Tokenizer, batch_size: int = 32) -> None:
        super().__init__()
        require(batch_size > 0, f"--batch-size {batch_size} must be positive")
        self._scorer, self._tokens = scorer, tokenizer
        self._prefix = tokenizer.token_text(tokenizer.special.start_id)
        self._context = scorer.model.context_length
        self._rows = -(-batch_size // scorer.devices) * scorer.devices

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text without context: BOS, or else the end-of-text token."""
        return self._tokens.special.start_id

    @property
    def tokenizer_name(self) -> str:
        """Name that caches of lm-eval tell tokenizers apart by."""
        return self._tokens.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text as `transformers` gives them, with BOS where the tokenizer adds it.

        As in lm-eval's own models, a text that already begins with the prefix token gets nothing added.
        """
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix and string.startswith(self._prefix))
        return self._tokens.encode(string, around=add_special_tokens)

    def bucket(self, length: int) -> int:
        """Return the row length for ``length`` inputs: a power of two, at most the context."""
        return min(self._context, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations after contexts: (log-likelihood, whether it is the greedy one) each.

        Raises:
            UserError: an answer has no token of its own (names the task's document).
        """
        del disable_tqdm
        return self._loglikelihood_tokens([(request.args, *self._pair(request)) for request in requests])

    def _pair(self, request: Any) -> tuple[list[int], list[int]]:
        """Tokenise a context and its continuation as lm-eval does, and where it has no answer, as it should.

        lm-eval encodes both joined and cuts after as many tokens as the context alone has. Where a token spans the
        join, nothing may be left: then the continuation is encoded alone, and scored after the context's own tokens
        (as in lm-eval's pull request 4055).
        """
        context, continuation = request.args
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        spaces = context[len(context.rstrip()) :]  # belong to the continuation, as in lm-eval
        after = after or self.tok_encode(spaces + continuation, add_special_tokens=False)
        where = f"document {(request.doc_id or 0) + 1}"
        require(len(after) > 0, f"{where}: the answer {continuation!r:.80} has no tokens, and cannot be scored")
        if before:
            return before, after
        if after[0] == self.prefix_token_id and len(after) > 1:  # the text begins with it
            return after[:1], after[1:]
        return [self.prefix_token_id], after

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score (texts, context tokens, continuation tokens); all have at least one of either."""
        rows = []
        for index, (_, context, continuation) in enumerate(requests):
            before = [*context, *continuation][-self._context - 1 :][: -len(continuation)] or [*context][-1:]
            stream = Row(np.array([*before, *continuation], np.int32), np.array([0]))
            first = len(before) - 1
            found = windows(stream, self._context, self._context)
            rows += [(index, window.row.tokens, max(window.first, first)) for window in found]
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        for index, tokens, first, scores in self._score(rows):
            last = len(tokens) - 1
            sums[index] -= float(np.sum(scores.nll_BT[first:last], dtype=np.float64))
            greedy[index] &= bool(np.all(scores.greedy_BT[first:last] == tokens[1:][first:]))
        return list(zip(sums, greedy, strict=True))

    def _score(self, rows: Iterable[tuple[int, np.ndarray, int]]) -> Iterable[tuple[int, np.ndarray, int, TokenScores]]:
        """Score rows of (index, tokens, anything), bucket by bucket; yield them with their scores."""
        buckets: dict[int, list[tuple[int, np.ndarray, int]]] = {}
        for row in rows:
            buckets.setdefault(self.bucket(max(1, len(row[1]) - 1)), []).append(row)
        for length, members in sorted(buckets.items()):
            for start in range(0, len(members), self._rows):
                chunk = members[start : start + self._rows]
                scores = self._scorer(self._batch([tokens for _, tokens, _ in chunk], length))
                for position, (index, tokens, first) in enumerate(chunk):
                    yield index, tokens, first, TokenScores(scores.nll_BT[position], scores.greedy_BT[position])

    def _batch(self, tokens: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        rows = [Row(row, np.array([0])) for row in tokens]
        rows += [Row(np.zeros(0, np.int32), np.zeros(0, np.int64))] * (self._rows - len(rows))
        expanded = [expand_row(row, length + 1) for row in rows]
        return {name: np.stack([row[name] for row in expanded]) for name in expanded[0]}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts: windows without overlap, the last one moved back to be full."""
        del disable_tqdm
        rows = []
        for index, request in enumerate(requests):
            tokens = np.array([self.prefix_token_id, *self.tok_encode(request.args[0])], np.int32)
            stream = Row(tokens, np.array([0]))
            rows += [(index, w.row.tokens, w.first) for w in windows(stream, self._context, self._context)]
        totals = [0.0] * len(requests)
        for index, tokens, first, scores in self._score(rows):
            totals[index] -= float(np.sum(scores.nll_BT[first : len(tokens) - 1], dtype=np.float64))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily, by whole forward passes (no cache), until a stop string or the token limit."""
        del disable_tqdm
        return [self._generate(*request.args) for request in requests]

    def _generate(self, text: str, options: dict[str, Any]) -> str:
        require(not options.get("do_sample"), "generate_until is greedy here: do_sample=True is not supported")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        made: list[int] = []
        for _ in range(int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS))):
            recent = np.array([*tokens, *made][-self._context :], np.int32)
            row = np.append(recent, np.int32(self.eot_token_id))  # the last entry is a target that is not read
            ((_, _, _, scores),) = self._score([(0, row, 0)])
            made.append(int(scores.greedy_BT[len(recent) - 1]))
            written = self._tokens.decode(made)
            ends = [written.find(stop) for stop in stops if stop and stop in written]
            if ends or made[-1] in self._tokens.special.stop_ids:
                return written[: min(ends)] if ends else written
        return self._tokens.decode(made)


def run_tasks(
    model: MorLM,
    tasks: Sequence[str],
    *,
    evalsets: Path | None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: the model.
        tasks: names, such as ``PAPER_TASKS``.
        evalsets: folder of local evaluation sets; None takes lm-eval's own tasks, which download their data.
        limit: documents per task; None is all.
        num_fewshot: examples before every document, for lm-eval's own tasks; local ones have none.

    Returns:
        Per task lm-eval's figures and its number of documents (``samples``); of a task that cannot be scored only why
        (``error``, with the document), the others' results being kept.

    Raises:
        UserError: an unknown task, or an evaluation set that is missing or cannot be scored; before anything is scored.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that our tasks take
    if evalsets is None:
        manager, found = TaskManager(), {name: name for name in tasks}
        for name in tasks:
            known = name in manager.all_tasks or Path(name).exists()  # the path of a task's definition
            require(known, f"lm-eval knows no task {name!r}{suggest(name, manager.all_tasks)}")
    else:
        require(not num_fewshot, f"--num-fewshot {num_fewshot}: local tasks are zero-shot")
        manager, found = TaskManager(include_defaults=False), {name: local_task(name, evalsets) for name in tasks}
    shots, results = None if evalsets is not None else num_fewshot, {}
    for name, task in found.items():
        try:
            results |= _run_task(model, task, manager, limit, shots)
        except UserError as error:
            results[name] = {"error": f"{name}, {error}"}
    return results


def _run_task(model: MorLM, task: Any, manager: Any, limit: int | None, shots: int | None) -> dict[str, Any]:
    """Evaluate one task, or group of tasks."""
    output: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        limit=limit,
        num_fewshot=shots,
        log_samples=False,
        bootstrap_iters=0,
        task_manager=manager,
    )
    counts = output.get("n-samples", {})
    return {
        name: {**_figures(values), "samples": counts.get(name, {}).get("effective")}
        for name, values in output["results"].items()
    }


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """Keep numbers, named without lm-eval's filter suffix."""
    numbers = {name.partition(",")[0]: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if not name.endswith("_stderr")}

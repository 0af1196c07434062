"""What a trained model answers, causally, and how many passes its answers take (letters: X answers, B, T)."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rows import make_dataset
from scipy.stats import rankdata

from mor_jax.config import Config, PerfConfig
from mor_jax.errors import require
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.evaluate.passes import batch_trace
from mor_jax.evaluate.scoring import Scorer, causal_mode, scoring_perf
from mor_jax.evaluate.validation import first_rows
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.runs.restore import RestoredRun

Batch = Mapping[str, np.ndarray]
_BATCH_ROWS = 256
_RESAMPLES = 1000


@dataclass(frozen=True)
class Answers:
    """Every answer of some rows, arrays [X]."""

    row_X: np.ndarray
    """int: number of its row."""
    difficulty_X: np.ndarray
    """int."""
    correct_X: np.ndarray
    """bool: whether the most likely token is right."""
    passes_X: np.ndarray | None
    """int: passes of the token that it is asked at; None without a router."""


def held_out_batches(config: Config, rows: int) -> list[Batch]:
    """Return held-out rows of a run's task as batches."""
    dataset = make_dataset(
        config.data,
        split="validation",
        context_length=config.model.context_length,
        vocab_size=config.model.vocab_size,
        batch_size=min(rows, _BATCH_ROWS),
    )
    return list(first_rows(dataset, rows))


def answers_of(weights: Weights, perf: PerfConfig, batches: Iterable[Batch], *, traced: bool = True) -> Answers:
    """Let a model answer the rows.

    Args:
        weights: the model.
        perf: of its run.
        batches: of ``held_out_batches``.
        traced: whether to note the passes, where there is a router.
    """
    scorer, mode = Scorer(weights, perf, all_devices=False), causal_mode(weights)
    how, routed = scoring_perf(weights.config, perf, mode), traced and weights.config.routing.kind != "none"
    found: list[tuple[np.ndarray, ...]] = []
    begin = 0
    for batch in batches:
        row_X, place_X = np.nonzero(batch["difficulty"][:, 1:])
        greedy_X = np.asarray(scorer(batch).greedy_BT)[row_X, place_X]
        columns = [
            begin + row_X,
            batch["difficulty"][row_X, place_X + 1],
            greedy_X == batch["labels"][row_X, place_X + 1],
        ]
        if routed:
            trace = batch_trace(weights, how, mode, Rows.of_batch(batch), jax.random.key(0))
            assert trace is not None
            columns.append(np.asarray(trace.depth_BT)[row_X, place_X])
        found.append(tuple(columns))
        begin += len(batch["tokens"])
    row_X, difficulty_X, correct_X, *passes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Answers(row_X, difficulty_X, correct_X, passes[0] if passes else None)


def by_difficulty(values_X: np.ndarray, difficulty_X: np.ndarray) -> dict[str, list[float]]:
    """Return [mean, count] by difficulty."""
    return {
        str(difficulty): [float(values_X[difficulty_X == difficulty].mean()), int((difficulty_X == difficulty).sum())]
        for difficulty in np.unique(difficulty_X).tolist()
    }


def mean_accuracy(accuracy: Mapping[str, Sequence[float]]) -> float:
    """Return the mean over difficulties, each of the same weight."""
    return float(np.mean([mean for mean, _ in accuracy.values()]))


def rank_correlation(passes_X: np.ndarray, answers: Answers, seed: int = 0) -> list[float] | None:
    """Return Spearman's correlation of passes with difficulty, and its 95% bootstrap interval.

    Rows are drawn again, whole, because their answers share a context; ranks are those of the whole sample.

    Returns:
        [correlation, low, high]; None if one of the two is constant.
    """
    if np.ptp(passes_X) == 0 or np.ptp(answers.difficulty_X) == 0:
        return None
    x_X, y_X = (ranks - ranks.mean() for ranks in (rankdata(passes_X), rankdata(answers.difficulty_X)))
    rows = int(answers.row_X.max()) + 1
    terms = (np.ones_like(x_X), x_X, y_X, x_X * x_X, y_X * y_X, x_X * y_X)
    sums_R6 = np.stack([np.bincount(answers.row_X, weights=term, minlength=rows) for term in terms], axis=1)
    counts_SR = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)
    count, x, y, xx, yy, xy = (np.concatenate([np.ones((1, rows)), counts_SR]) @ sums_R6).T
    correlation = (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))
    return [float(correlation[0]), *(float(q) for q in np.quantile(correlation[1:], (0.025, 0.975)))]


def routing_report(answers: Answers) -> dict[str, Any]:
    """Say who gets the passes: by difficulty, and the rank correlation of this router and of two others.

    The others give away the same passes: one at random, the other to the most difficult answers.
    """
    passes_X = answers.passes_X
    assert passes_X is not None
    by_chance_X = np.random.default_rng(1).permutation(passes_X)
    knowing_X = np.empty_like(passes_X)
    knowing_X[np.argsort(answers.difficulty_X, kind="stable")] = np.sort(passes_X)
    routers = {"router": passes_X, "random": by_chance_X, "knowing": knowing_X}
    return {
        "passes": by_difficulty(passes_X, answers.difficulty_X),
        "correlation": {name: rank_correlation(passes, answers) for name, passes in routers.items()},
    }


def with_passes(weights: Weights, passes: int) -> Weights:
    """Return a recursive model without a router that takes any number of passes, more than trained too.

    Raises:
        UserError: a model that has a router or repeats nothing.
    """
    model = weights.config
    repeats = model.recursion.repeats_block and model.routing.kind == "none" and model.recursion.share_norms
    require(repeats, "only a recursive model without a router takes other numbers of passes")
    recursion = dataclasses.replace(model.recursion, num_recursions=passes, base_depth=model.block_depth)
    layers = 2 * model.recursion.has_middle + model.block_depth * passes
    return dataclasses.replace(weights, config=dataclasses.replace(model, recursion=recursion, num_layers=layers))


def by_passes(weights: Weights, perf: PerfConfig, batches: Sequence[Batch]) -> dict[str, dict[str, list[float]]]:
    """Return the accuracy by difficulty under every cap on the passes; without a router also beyond, to twice N_r."""
    trained, routed = weights.config.recursion.num_recursions, weights.config.routing.kind != "none"
    curve = {}
    for passes in range(1, (trained if routed else 2 * trained) + 1):
        capped = cap_depth(weights, passes) if routed else with_passes(weights, passes)
        found = answers_of(capped, perf, batches, traced=False)
        curve[str(passes)] = by_difficulty(found.correct_X, found.difficulty_X)
    return curve


def easy_and_hard(answers: Answers) -> dict[str, Any]:
    """Compare the easiest and the hardest answers of every row.

    Returns:
        Accuracy of both and, with a router, mean passes of both and the share of rows whose hardest answers take more
        passes, as many, or fewer than their easiest.
    """
    low_R, high_R = (np.full(int(answers.row_X.max()) + 1, start) for start in (10**6, 0))
    np.minimum.at(low_R, answers.row_X, answers.difficulty_X)
    np.maximum.at(high_R, answers.row_X, answers.difficulty_X)
    sides = {
        "easy": answers.difficulty_X == low_R[answers.row_X],
        "hard": answers.difficulty_X == high_R[answers.row_X],
    }
    report: dict[str, Any] = {"accuracy": {side: float(answers.correct_X[of].mean()) for side, of in sides.items()}}
    if answers.passes_X is None:
        return report
    report["passes"] = {side: float(answers.passes_X[of].mean()) for side, of in sides.items()}
    easy_R, hard_R = (
        np.bincount(answers.row_X[of], weights=answers.passes_X[of]) / np.bincount(answers.row_X[of])
        for of in sides.values()
    )
    orders = {"more": hard_R > easy_R, "equal": hard_R == easy_R, "fewer": hard_R < easy_R}
    return report | {"rows": {order: float(share.mean()) for order, share in orders.items()}}


def measure(run: RestoredRun, rows: int) -> dict[str, Any]:
    """Measure a run on ``rows`` held-out rows: see the functions above."""
    weights, perf = run.weights, run.config.perf
    batches = held_out_batches(run.config, rows)
    answers = answers_of(weights, perf, batches)
    accuracy = by_difficulty(answers.correct_X, answers.difficulty_X)
    found: dict[str, Any] = {"accuracy": accuracy, "mean_accuracy": mean_accuracy(accuracy)}
    if answers.passes_X is not None:
        found |= routing_report(answers)
    found["easy_and_hard"] = easy_and_hard(answers)
    if run.config.model.recursion.repeats_block:
        found["by_passes"] = by_passes(weights, perf, batches)
    return found

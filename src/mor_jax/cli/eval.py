"""``mor eval RUN``: held-out loss of a run's newest checkpoint, loss on any text, and tasks of lm-eval."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import require
from mor_jax.paths import to_path

if TYPE_CHECKING:
    from mor_jax.runs.restore import RestoredRun

_BATCH_SIZE = 32


@dataclass(frozen=True)
class EvalArguments:
    """Arguments of ``mor eval``."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, local or `gs://`."""
    rows: int | None = None
    """Rows of held-out text; None is the run's train.eval_rows."""
    text: tuple[Path, ...] = ()
    """Files to measure instead of the held-out text (text, JSON, parquet; compressed too), by a sliding window."""
    stride: int | None = None
    """With --text: tokens that the window moves by; None is half the context."""
    tasks: str | None = None
    """Tasks of lm-eval, joined by commas, or `paper` for the paper's set; scored causally."""
    evalsets: Path | None = None
    """With --tasks: folder of local evaluation sets; None takes lm-eval's own tasks, which download their data."""
    limit: int | None = None
    """With --tasks: documents per task."""
    num_fewshot: int | None = None
    """With --tasks: examples before every document."""
    batch_size: int | None = None
    """With --tasks: rows at a time; None is 32."""
    calibrate: int = 0
    """Rows of training text on which the boundaries of expert-choice are calibrated first."""
    max_depth: int | None = None
    """Cap on the passes of a token (test-time scaling)."""
    within_documents: bool = False
    """Leave a document's first token out also where attention crosses borders: to compare with masked documents."""
    json: bool = False
    """Print JSON, with all statistics."""


def run(arguments: Sequence[str]) -> int:
    """Measure and print."""
    options = parse(EvalArguments, arguments, "eval", "Measure a run on held-out text, on any text, or on tasks.")
    _check(options)
    enable_compilation_cache()
    if options.tasks is not None:
        _tasks(options)
    elif options.text:
        _text(options)
    else:
        _held_out(options)
    return 0


def _check(options: EvalArguments) -> None:
    """Refuse flags that would do nothing, and values out of range, before anything is read."""
    tasks, text = options.tasks is not None, bool(options.text)
    held_out = not (tasks or text)
    require(not (tasks and text), "--text and --tasks exclude each other")
    for flag, value, applies, rule in (
        ("--rows", options.rows, held_out, "is for the held-out loss"),
        ("--stride", options.stride, text, "needs --text"),
        ("--evalsets", options.evalsets, tasks, "needs --tasks"),
        ("--limit", options.limit, tasks, "needs --tasks"),
        ("--num-fewshot", options.num_fewshot, tasks, "needs --tasks"),
        ("--batch-size", options.batch_size, tasks, "needs --tasks"),
        ("--within-documents", options.within_documents or None, not tasks, "is for losses"),
    ):
        require(value is None or applies, f"{flag} {rule}")
    for flag, value in (("--rows", options.rows), ("--limit", options.limit), ("--batch-size", options.batch_size)):
        require(value is None or value > 0, f"{flag} {value} must be positive")
    for flag, value in (("--calibrate", options.calibrate), ("--num-fewshot", options.num_fewshot)):
        require(value is None or value >= 0, f"{flag} {value} must not be negative")


def _held_out(options: EvalArguments) -> None:
    from mor_jax.evaluate.inspect import evaluate_run
    from mor_jax.evaluate.validation import summary

    restored, losses = evaluate_run(
        to_path(options.run),
        rows=options.rows,
        max_depth=options.max_depth,
        calibration_rows=options.calibrate,
        within_documents=options.within_documents,
    )
    boundaries = restored.boundaries
    if options.json:
        _print_json({"run": options.run, "step": restored.step, "boundaries": boundaries, **losses})
        return
    print(f"step {restored.step}, {losses['validation_tokens']} held-out tokens")
    if boundaries is not None:
        calibrated = restored.config.model.routing.boundaries is not None
        words = ", ".join(f"{boundary:.4g}" for boundary in boundaries)
        print(f"{'calibrated' if calibrated else 'running'} boundaries: {words}")
    print(summary(restored.weights, losses))


def _restored(options: EvalArguments) -> "RestoredRun":
    """Restore the run, with calibrated boundaries if that was asked for."""
    from mor_jax.evaluate.inspect import calibrated
    from mor_jax.interop.sources import open_run

    restored = open_run(to_path(options.run))
    return calibrated(restored, options.calibrate) if options.calibrate else restored


def _text(options: EvalArguments) -> None:
    from mor_jax.evaluate.text_loss import text_losses, text_summary

    restored = _restored(options)
    losses = text_losses(
        restored,
        options.text,
        stride=options.stride,
        max_depth=options.max_depth,
        within_documents=options.within_documents,
    )
    if options.json:
        _print_json({"run": options.run, "step": restored.step, "boundaries": restored.boundaries, **losses})
        return
    print(f"step {restored.step}, window {losses['context']} tokens, stride {losses['stride']}")
    print(text_summary(losses))


def _tasks(options: EvalArguments) -> None:
    from mor_jax.evaluate.depth_cap import cap_depth
    from mor_jax.evaluate.harness import MorLM, run_tasks
    from mor_jax.evaluate.scoring import Scorer
    from mor_jax.evaluate.tasks.local import PAPER_TASKS

    assert options.tasks is not None
    names = PAPER_TASKS if options.tasks == "paper" else tuple(options.tasks.split(","))
    restored = _restored(options)
    weights = restored.weights if options.max_depth is None else cap_depth(restored.weights, options.max_depth)
    scorer = Scorer(weights, restored.config.perf)
    results = run_tasks(
        MorLM(scorer, restored.tokenizer, options.batch_size or _BATCH_SIZE),
        names,
        evalsets=options.evalsets,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    scored = {name: figures for name, figures in results.items() if "error" not in figures}
    if options.json:
        report: dict[str, Any] = {"run": options.run, "step": restored.step, "mode": scorer.mode}
        report |= {"boundaries": restored.boundaries, "tasks": results}
        _print_json(report)
    else:
        print(f"step {restored.step}, selection {scorer.mode}")
        for name, figures in scored.items():
            print(f"{name:16s} " + "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items()))
    failed = [figures["error"] for figures in results.values() if "error" in figures]
    require(not failed, "; ".join(failed))  # last: the other tasks' results are there


def _print_json(report: dict[str, Any]) -> None:
    """Print JSON, which knows no NaN and no infinity: a figure that is neither a number nor finite is null."""
    print(json.dumps(_finite(report), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

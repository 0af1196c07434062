"""Further measurements of a finished run of a sweep: loss on given texts, and loss by a cap on the passes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor_jax.errors import require
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.evaluate.inspect import calibrated, held_out
from mor_jax.evaluate.text_loss import text_losses
from mor_jax.evaluate.validation import threshold_refusal, validation_losses
from mor_jax.interop.sources import open_run
from mor_jax.runs.restore import RestoredRun
from mor_jax.sweep.execute import Measure


def measurer(texts: Sequence[Path], *, depth_curve: bool, calibration_rows: int = 0) -> Measure | None:
    """Return what to measure of every finished run, or None if it is nothing.

    Args:
        texts: files for ``text_losses``, windows without overlap.
        depth_curve: whether to cap the depth at 1, ..., N_r.
        calibration_rows: rows of training text to calibrate the boundaries of expert-choice on; 0 is not to.

    Raises:
        UserError: a text that is not there, or a negative number of rows.
    """
    require(calibration_rows >= 0, f"calibration rows {calibration_rows} must not be negative")
    for text in texts:
        require(text.is_file(), f"--text {text}: no such file")
    if not texts and not depth_curve and not calibration_rows:
        return None

    def measure(folder: Path) -> dict[str, Any]:
        run = open_run(folder)
        found: dict[str, Any] = {}
        if texts:
            found["text"] = text_losses(run, texts, stride=run.config.model.context_length)
        if depth_curve and _has_passes(run):
            found["depth_curve"] = depth_losses(run)
        routing = run.config.model.routing
        if calibration_rows and routing.kind == "expert" and routing.sampling != "aux_router" and not routing.random:
            found["calibrated"] = calibrated_losses(run, calibration_rows, texts)
        return found

    return measure


def _has_passes(run: RestoredRun) -> bool:
    model = run.config.model
    refused = model.routing.kind == "expert" and threshold_refusal(run.weights) is not None
    return model.recursion.num_recursions > 1 and not model.recursion.is_sequence and not refused


def depth_losses(run: RestoredRun, rows: int | None = None) -> list[dict[str, Any]]:
    """Measure the causal held-out loss with the depth capped at 1, 2, ..., N_r passes (test-time scaling).

    Args:
        run: of ``open_run``.
        rows: rows of held-out text; None is the run's ``train.eval_rows``.

    Returns:
        ``max_depth``, ``nll``, ``bits_per_byte`` and, with a router, ``mean_depth`` by cap.
    """
    dataset, curve = held_out(run), []
    prefix = "validation_" if run.config.model.routing.kind == "none" else "validation_threshold_"
    for cap in range(1, run.config.model.recursion.num_recursions + 1):
        weights, wanted = cap_depth(run.weights, cap), rows or run.config.train.eval_rows
        losses = validation_losses(weights, run.config.perf, dataset, wanted)
        point = {"max_depth": cap, "nll": losses[f"{prefix}nll"], "bits_per_byte": losses[f"{prefix}bits_per_byte"]}
        shares = losses.get(f"{prefix}tokens_per_depth")
        if shares is not None:
            point["mean_depth"] = sum(depth * share for depth, share in enumerate(shares))
        curve.append(point)
    dataset.close()
    return curve


def calibrated_losses(run: RestoredRun, calibration_rows: int, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """Measure the causal losses, held-out and on given texts, with boundaries calibrated on training text."""
    run = calibrated(run, calibration_rows)
    config = run.config
    dataset = held_out(run)
    losses = validation_losses(run.weights, config.perf, dataset, config.train.eval_rows)
    dataset.close()
    figures: dict[str, Any] = {"nll": losses["validation_threshold_nll"], "gap": losses["validation_gap"]}
    figures["tokens_per_depth"] = losses["validation_threshold_tokens_per_depth"]
    if texts:
        figures["text"] = text_losses(run, texts, stride=config.model.context_length)
    return {"boundaries": config.model.routing.boundaries, **figures}

"""`mor inspect` and `mor eval`: the pictures and the held-out losses of a run again, from its newest checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.data.manifest import Split
from mor_jax.data.packing import Row, cut_row, expand_row
from mor_jax.data.pipeline import make_dataset
from mor_jax.errors import require
from mor_jax.evaluate.calibrate import calibrate, with_boundaries
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.evaluate.pictures import run_title, write_pictures
from mor_jax.evaluate.validation import first_rows, validation_losses
from mor_jax.interop.sources import open_run
from mor_jax.model.rows import Rows
from mor_jax.runs.metrics import read_metrics
from mor_jax.runs.restore import RestoredRun


def inspect_run(
    run_folder: Path, *, text: str | None = None, output: Path | None = None, analysis: bool = False
) -> list[Path]:
    """Restore a run and write its pictures.

    Args:
        run_folder: of ``mor train``.
        text: text to route; None takes the run's held-out text.
        output: folder for the pictures; None is the run's own, or ``inspect`` in it when a text is given.
        analysis: whether to analyse the router as well (see ``analysis.analyse``), into ``analysis`` in that folder.

    Returns:
        The files written: loss.png and, for a model with a router, depth.png and routing.html.

    Raises:
        UserError: no run or no good checkpoint there, an empty text, or a folder that cannot be written.
    """
    run = open_run(run_folder)
    config = run.config
    folder = output or (run_folder if text is None else run_folder / "inspect")
    if text is not None:
        tokens = run.tokenizer.encode(text)
        batches = text_batches(tokens, config.model.context_length)
        packed = text_rows(tokens, config.model.context_length) if analysis else []
    else:
        packed = list(first_rows(held_out(run), config.train.eval_rows))
        batches = [Rows.of_batch(batch) for batch in packed]
    metrics = read_metrics(run_folder / "metrics.jsonl")
    title = run_title(run_folder, config)
    written = write_pictures(folder, title, run.weights, config.perf, batches, run.tokenizer, metrics)
    if not analysis:
        return written

    from mor_jax.evaluate.analysis import analyse  # matplotlib, which `mor eval` does not need

    return [*written, *analyse(run, packed, metrics, folder / "analysis")]


def evaluate_run(
    run_folder: Path,
    *,
    rows: int | None = None,
    max_depth: int | None = None,
    calibration_rows: int = 0,
    within_documents: bool = False,
) -> tuple[RestoredRun, dict[str, Any]]:
    """Restore a run and measure it on its held-out text.

    Args:
        run_folder: of ``mor train``.
        rows: rows of held-out text; None is the run's ``train.eval_rows``.
        max_depth: cap on the passes of a token; None is none.
        calibration_rows: rows of training text that the boundaries of expert-choice are calibrated on first; 0 leaves
            them as they are.
        within_documents: see ``validation_losses``.

    Returns:
        (the run, with calibrated boundaries if asked for; what ``validation_losses`` gives for it).

    Raises:
        UserError: no run or no good checkpoint there, no held-out text, or data of another tokenizer.
    """
    run = open_run(run_folder)
    if calibration_rows:
        run = calibrated(run, calibration_rows)
    wanted = run.config.train.eval_rows if rows is None else rows
    weights = run.weights if max_depth is None else cap_depth(run.weights, max_depth)
    dataset = held_out(run)
    return run, validation_losses(weights, run.config.perf, dataset, wanted, within_documents=within_documents)


def calibrated(run: RestoredRun, rows: int) -> RestoredRun:
    """Return a run whose boundaries are calibrated on ``rows`` rows of its training text."""
    config = run.config
    batch_size = min(rows, config.train.batch_size)
    dataset = _rows_of(run, "train", batch_size)
    boundaries = calibrate(run.weights, config.perf, (dataset.batch(step) for step in range(-(-rows // batch_size))))
    dataset.close()
    return dataclasses.replace(run, config=with_boundaries(config, boundaries))


def text_batches(tokens: Sequence[int], context_length: int) -> list[Rows]:
    """Cut a text into model inputs: full rows as one batch, and a shorter last row as another, without padding.

    Padding would take no seat, but top-k counts its seats by the length of the row.

    Args:
        tokens: of one document.
        context_length: T, the longest row.

    Raises:
        UserError: the text has no tokens.
    """
    require(len(tokens) > 0, "the text to inspect is empty")
    full = len(tokens) // context_length * context_length
    parts = [np.array(tokens[:full], np.int32).reshape(-1, context_length), np.array([tokens[full:]], np.int32)]
    return [_document_rows(part) for part in parts if part.size]


def text_rows(tokens: Sequence[int], context_length: int) -> list[Mapping[str, Any]]:
    """Cut a text into packed rows of T + 1 tokens as one batch, the last row padded.

    Args:
        tokens: of one document.
        context_length: T.
    """
    require(len(tokens) > 1, f"the text to analyse has {len(tokens)} tokens, which predict nothing")
    stream = Row(np.array(tokens, np.int32), np.array([0]))
    offsets = range(0, len(tokens) - 1, context_length)
    rows = [expand_row(cut_row(stream, offset, context_length + 1), context_length + 1) for offset in offsets]
    return [{name: np.stack([row[name] for row in rows]) for name in rows[0]}]


def _document_rows(tokens_BT: np.ndarray) -> Rows:
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    arrays: Any = (tokens_BT, positions_BT, np.ones_like(tokens_BT))
    return Rows(*arrays)


def held_out(run: RestoredRun) -> Any:
    """Open the held-out rows of a run, as the trainer does; raise UserError if its data are not what they were."""
    train = run.config.train
    return _rows_of(run, "validation", min(train.eval_rows, train.batch_size // train.accumulation))


def _rows_of(run: RestoredRun, split: Split, batch_size: int) -> Any:
    config = run.config
    dataset = make_dataset(
        config.data,
        split=split,
        context_length=config.model.context_length,
        vocab_size=config.model.vocab_size,
        batch_size=batch_size,
    )
    require(
        dataset.tokenizer.hash == run.tokenizer.hash,
        f"data.source={config.data.source!r} gives tokens of another tokenizer than the run's: its text was prepared "
        "again since the training, by another Python (whose standard library is another text) or another tokenizers",
    )
    return dataset

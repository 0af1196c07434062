"""The pictures that a run ends with: loss.png, depth.png and routing.html."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax.config import Config, Mode, PerfConfig
from mor_jax.evaluate.html import Section, routing_page
from mor_jax.evaluate.passes import MODE_NOTES, Tokenizer, batch_trace, evaluation_perf, spread
from mor_jax.evaluate.routing import RoutedRow, routed_rows
from mor_jax.evaluate.validation import HeldOut, first_rows, modes_of
from mor_jax.mesh.processes import is_primary, to_host
from mor_jax.model.parameters import Weights
from mor_jax.model.routing.boundaries import listed
from mor_jax.model.rows import Rows
from mor_jax.runs.folder import writing_to
from mor_jax.runs.metrics import read_metrics

_PAGE_TOKENS = 2048
"""Tokens shown per selection mode; more make the page slow to scroll."""
_TOKEN_CHOICE_NOTE = "causal: token-choice decides every token by itself"


def write_run_pictures(run_folder: Path, config: Config, weights: Weights, dataset: HeldOut) -> list[Path]:
    """Write the pictures of a run from its metrics and from held-out text; all processes compute, the first writes.

    Args:
        run_folder: holds metrics.jsonl; the pictures go beside it.
        config: of the run.
        weights: its model.
        dataset: held-out batches with their ``tokenizer``; ``train.eval_rows`` rows are used.

    Returns:
        The files written: loss.png and, for a model with a router, depth.png and routing.html.

    Raises:
        UserError: no held-out text, or the folder cannot be written.
    """
    rows = [Rows.of_batch(batch) for batch in first_rows(dataset, config.train.eval_rows)]
    metrics = read_metrics(run_folder / "metrics.jsonl")
    title = run_title(run_folder, config)
    return write_pictures(run_folder, title, weights, config.perf, rows, dataset.tokenizer, metrics)


def run_title(run_folder: Path, config: Config) -> str:
    """Name a run, and its preset if that is another name."""
    name = run_folder.resolve().name
    return name if name == config.preset else f"{name} ({config.preset})"


def write_pictures(
    folder: Path,
    title: str,
    weights: Weights,
    perf: PerfConfig,
    batches: Sequence[Rows],
    tokenizer: Tokenizer,
    metrics: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Write pictures of any text; all processes compute, the first writes.

    Args:
        folder: created if missing.
        title: heading of every picture.
        weights: the model.
        perf: of its run; see ``evaluation_perf``.
        batches: the text as model inputs.
        tokenizer: spells the tokens.
        metrics: lines of metrics.jsonl; without a training loss among them loss.png is not written.

    Returns:
        The files written; depth.png and routing.html only for a model with a router.

    Raises:
        UserError: the folder cannot be written.
    """
    model = weights.config
    modes = () if model.routing.kind == "none" else modes_of(weights)
    by_mode: dict[Mode, list[RoutedRow]] = {mode: trace_rows(weights, perf, batches, mode) for mode in modes}
    written: list[Path] = []
    if not is_primary():
        return written
    from mor_jax.evaluate.plots import plot_depth, plot_loss  # matplotlib, which a run without pictures does not need

    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any("loss" in line for line in metrics):
            written.append(folder / "loss.png")
            plot_loss(written[-1], metrics, title)
        if not by_mode:
            return written
        mode: Mode = "threshold" if "threshold" in by_mode else "topk"
        written += [folder / "depth.png", folder / "routing.html"]
        plot_depth(written[-2], metrics, by_mode[mode], mode, title)
        sections = [_section(weights, name, rows) for name, rows in reversed(by_mode.items())]
        written[-1].write_text(routing_page(title, sections, tokenizer), encoding="utf-8")
    return written


def trace_rows(weights: Weights, perf: PerfConfig, batches: Iterable[Rows], mode: Mode) -> list[RoutedRow]:
    """Route text and return every row's way through the recursions (see ``write_pictures`` for the arguments)."""
    execution, routed = evaluation_perf(perf), []
    for index, rows in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(0), index)
        trace = to_host(batch_trace(weights, execution, mode, spread(weights.params, rows), key))
        routed += routed_rows(np.asarray(rows.tokens_BT), np.asarray(rows.segment_ids_BT), trace)
    return routed


def _section(weights: Weights, mode: Mode, rows: Sequence[RoutedRow]) -> Section:
    model = weights.config
    count = max(1, _PAGE_TOKENS // model.context_length)
    note = MODE_NOTES[mode] if model.routing.kind == "expert" else _TOKEN_CHOICE_NOTE
    if mode == "threshold" and model.routing.kind == "expert":
        boundaries = listed(model, weights.boundaries_R)
        note += f"; boundaries {', '.join(f'{boundary:.4g}' for boundary in boundaries)}"
    shown = f"; the first {count} of {len(rows)} rows" if len(rows) > count else ""
    return Section(title=mode, note=note + shown, rows=rows[:count])


def write_loss_picture(run_folder: Path, config: Config) -> None:
    """Write loss.png alone, all that a run without held-out text has to show; the first process writes."""
    metrics = read_metrics(run_folder / "metrics.jsonl")
    if is_primary() and any("loss" in line for line in metrics):
        from mor_jax.evaluate.plots import plot_loss

        with writing_to(run_folder):
            plot_loss(run_folder / "loss.png", metrics, run_title(run_folder, config))

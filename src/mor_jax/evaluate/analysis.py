"""`mor inspect RUN --analysis`: what depth goes with, how the router fared, what every pass changes and attends to.

Writes analysis.json and depth_by.csv, and the figures depth_by, router, hidden and attention as PNG and SVG.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Mode
from mor_jax.evaluate.analysis_plots import plot_attention, plot_correlates, plot_hidden, plot_router
from mor_jax.evaluate.attention_by_pass import attention_by_pass
from mor_jax.evaluate.correlates import RoutedText, as_csv, as_json, correlates
from mor_jax.evaluate.hidden import hidden_changes
from mor_jax.evaluate.pictures import trace_rows
from mor_jax.evaluate.routing import depth_by_token, tokens_per_depth
from mor_jax.evaluate.scoring import Scorer
from mor_jax.evaluate.validation import modes_of
from mor_jax.model.loss import batch_labels
from mor_jax.model.rows import Rows
from mor_jax.runs.folder import writing_to
from mor_jax.runs.metrics import read_metrics
from mor_jax.runs.restore import RestoredRun

_TOKENS_LISTED = 200
_LEAST_COUNT = 5
ROUTER_METRICS = ("threshold_accuracy_R", "dead_token_ratio", "max_vio", "entropy")
"""Entries of metrics.jsonl that are drawn over training."""


def analyse(run: RestoredRun, batches: Sequence[Mapping[str, Any]], metrics: Sequence[Any], folder: Path) -> list[Path]:
    """Analyse the router of a run on a text, and write the results.

    Args:
        run: of ``interop.sources.open_run``.
        batches: the text as packed rows, int32 [B, T+1] ``tokens``, ``segment_ids``, ``positions``.
        metrics: lines of metrics.jsonl.
        folder: for the files; created if missing.

    Returns:
        The files written. Without a router only the hidden states and the attention of every pass are analysed.

    Raises:
        UserError: the folder cannot be written.
    """
    report: dict[str, Any] = {"run_step": run.step}
    written: list[Path] = []
    routed = run.config.model.routing.kind != "none"
    mode: Mode = "threshold" if "threshold" in modes_of(run.weights) else "topk"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if routed:
            text = routed_text(run, batches, mode)
            found = correlates(text)
            report |= {"mode": mode, "tokens_per_depth": tokens_per_depth(text.rows).tolist()}
            report |= {"depth_by": as_json(found), "depth_by_token": _token_table(text)}
            (folder / "depth_by.csv").write_text(as_csv(found), encoding="utf-8")
            written += [folder / "depth_by.csv", *plot_correlates(folder / "depth_by", found, mode)]
            report["over_training"] = router_history(metrics)
            written += plot_router(folder / "router", report["over_training"])
        if run.config.model.recursion.sharing != "none" and not run.config.model.recursion.is_sequence:
            inputs, perf = [Rows.of_batch(batch) for batch in batches], run.config.perf
            report["hidden_changes"] = hidden_changes(run.weights, perf, inputs, mode)
            written += plot_hidden(folder / "hidden", report["hidden_changes"])
            report["attention"] = attention_by_pass(run.weights, perf, inputs, mode)
            written += plot_attention(folder / "attention", report["attention"])
        (folder / "analysis.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [folder / "analysis.json", *written]


def routed_text(run: RestoredRun, batches: Sequence[Mapping[str, Any]], mode: Mode) -> RoutedText:
    """Route packed rows and score what follows every token.

    Args:
        run: of a model with a router.
        batches: packed rows, int32 [B, T+1].
        mode: selection mode of both.
    """
    model, perf = run.config.model, run.config.perf
    rows = trace_rows(run.weights, perf, [Rows.of_batch(batch) for batch in batches], mode)
    scorer = Scorer(run.weights, perf, mode=mode, all_devices=False)
    surprisals = []
    counts_V = np.zeros(model.vocab_size, np.int64)
    for batch in batches:
        nll_BT = np.asarray(scorer(batch).nll_BT, np.float64)
        _, known_BT = batch_labels(model, batch)
        for nll_T, known_T, segments_T in zip(nll_BT, known_BT, batch["segment_ids"][:, :-1], strict=True):
            length = int(np.count_nonzero(segments_T))
            if length:
                surprisals.append(np.where(known_T, nll_T, np.nan)[:length])
    for row in rows:
        counts_V += np.bincount(row.tokens_T, minlength=model.vocab_size)
    return RoutedText(rows, surprisals, counts_V, run.tokenizer)


def _token_table(text: RoutedText) -> list[dict[str, Any]]:
    """The tokens of the text that occur often enough, deepest first; the most frequent ones if there are many."""
    entries = depth_by_token(text.rows, at_least=_LEAST_COUNT)
    frequent = sorted(entries, key=lambda entry: -entry.count)[:_TOKENS_LISTED]
    kept = {entry.token for entry in frequent}
    spell = text.tokenizer.token_bytes
    return [
        {
            "token": entry.token,
            "text": spell(entry.token).decode("utf-8", errors="replace"),
            "count": entry.count,
            "mean_depth": entry.mean_depth,
        }
        for entry in entries
        if entry.token in kept
    ]


def router_history(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Collect what the router did over training: ``step``, and at each of them the ``ROUTER_METRICS``.

    Where training kept running boundaries of expert-choice, also ``boundaries_R``.
    """
    lines = [line for line in metrics if all(name in line for name in ROUTER_METRICS)]
    history: dict[str, list[Any]] = {"step": [line["step"] for line in lines]}
    kept = bool(lines) and all("boundaries_R" in line for line in lines)
    names = (*ROUTER_METRICS, "boundaries_R") if kept else ROUTER_METRICS
    return history | {name: [line[name] for line in lines] for name in names}


def read_history(run_folder: Path) -> dict[str, list[Any]]:
    """Return ``router_history`` of a run folder."""
    return router_history(read_metrics(run_folder / "metrics.jsonl"))

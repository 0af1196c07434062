"""Held-out loss under both selection modes, in nats per token and in bits per byte, with what the router did.

`topk` looks ahead along the sequence, so its loss is a training figure; `threshold` is causal and is what generation
attains (paper section 2.2.1 and table 13). Letters: R recursions, V vocabulary, T positions.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from mor_jax.config import Mode, ModelConfig, PerfConfig
from mor_jax.errors import require
from mor_jax.evaluate.passes import MODE_NOTES, BatchTotals, batch_totals, evaluation_perf, spread
from mor_jax.evaluate.text_bytes import token_lengths
from mor_jax.mesh.processes import to_host
from mor_jax.model.parameters import Weights
from mor_jax.model.routing.boundaries import boundary_refusal


class HeldOut(Protocol):
    """Held-out rows that can be read again and again, such as ``data.pipeline.make_dataset(split="validation")``."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the rows."""
        ...

    @property
    def steps(self) -> int | None:
        """Batches of one pass over the text; None if it never ends."""
        ...

    def batch(self, step: int) -> Mapping[str, Any]:
        """Return batch number ``step``: int32 [B, T+1] ``tokens``, ``segment_ids``, ``positions``."""
        ...


def threshold_refusal(weights: Weights) -> str | None:
    """Say why a model cannot be evaluated under `threshold`, or None if it can."""
    model = weights.config
    if model.routing.kind == "none":
        return "without a router there is nothing to select"
    return boundary_refusal(model, weights.boundaries_R)


def modes_of(weights: Weights) -> tuple[Mode, ...]:
    """Selection modes to evaluate a model in: `topk` alone where `threshold` is refused."""
    return ("topk",) if threshold_refusal(weights) else ("topk", "threshold")


def validation_losses(
    weights: Weights, perf: PerfConfig, dataset: HeldOut, rows: int, *, within_documents: bool = False
) -> dict[str, Any]:
    """Measure a model on the first ``rows`` rows of held-out text (in whole batches, as far as it reaches).

    Capacities are those after every warm-up.

    Args:
        weights: the model.
        perf: of its run; see ``evaluation_perf``.
        dataset: held-out rows with their tokenizer; read from its first batch, and not moved.
        rows: rows to measure.
        within_documents: whether a document's first token is no target even where attention crosses borders: to
            compare with a model whose documents are masked.

    Returns:
        Numbers and lists of numbers. Always ``validation_tokens`` and ``validation_bytes``. Without a router
        ``validation_nll`` (nats per target token) and ``validation_bits_per_byte``. With one, for MODE `topk` and
        `threshold`: ``validation_MODE_nll``, ``validation_MODE_bits_per_byte``, ``validation_MODE_tokens_per_depth``
        (shares of depth 0..R), ``validation_MODE_dead_token_ratio`` (positions that the last recursion computed in no
        row) and, for token-choice, ``validation_MODE_dropped``; ``validation_gap`` (threshold minus topk, nats) and
        for expert-choice ``validation_threshold_accuracy`` (per recursion: share of active tokens that the boundary
        decides as top-k did). What needs a boundary is absent where ``threshold_refusal`` gives a reason.

    Raises:
        UserError: ``rows`` is not positive, or there is no held-out text.
    """
    require(rows > 0, f"eval_rows={rows} must be positive")
    model, execution = weights.config, evaluation_perf(perf)
    lengths_2V = token_lengths(dataset.tokenizer, model.vocab_size)
    sums: dict[Mode, _Sums] = {mode: _Sums(model) for mode in modes_of(weights)}
    for index, batch in enumerate(first_rows(dataset, rows)):
        key = jax.random.fold_in(jax.random.key(0), index)
        batch = spread(weights.params, batch)
        for mode, total in sums.items():
            found = batch_totals(weights, execution, mode, batch, lengths_2V, key, within_documents=within_documents)
            total.add(to_host(found))
    require(sums["topk"].tokens > 0, "the validation split holds no target tokens: give data.source more text")
    return _report(model, sums)


def first_rows(dataset: HeldOut, rows: int) -> Iterator[Mapping[str, Any]]:
    """Yield batches from the first on until at least ``rows`` rows, or all there are, have come.

    Raises:
        UserError: there are none.
    """
    require(dataset.steps != 0, "the validation split holds no rows: give data.source more text")
    first = dataset.batch(0)
    yield first
    wanted = math.ceil(rows / first["tokens"].shape[0])
    for step in range(1, wanted if dataset.steps is None else min(wanted, dataset.steps)):
        yield dataset.batch(step)


def summary(weights: Weights, losses: Mapping[str, Any]) -> str:
    """Say a result of ``validation_losses`` in one line, with what each selection mode means."""
    model = weights.config
    if model.routing.kind == "none":
        return f"{losses['validation_nll']:.4f} nats/token, {losses['validation_bits_per_byte']:.4f} bits/byte"
    parts = []
    for mode in modes_of(weights):
        nll, bits = losses[f"validation_{mode}_nll"], losses[f"validation_{mode}_bits_per_byte"]
        note = MODE_NOTES[mode].split(":")[0] if model.routing.kind == "expert" else "causal"
        parts.append(f"{mode} {nll:.4f} nats/token, {bits:.4f} bits/byte ({note})")
    refusal = threshold_refusal(weights)
    parts.append(f"threshold refused: {refusal}" if refusal else f"gap {losses['validation_gap']:+.4f} nats/token")
    return "; ".join(parts)


class _Sums:
    """Totals of one mode over all batches, added on the host in float64 and integers."""

    def __init__(self, model: ModelConfig) -> None:
        recursions = model.recursion.num_recursions
        self.nll, self.tokens, self.bytes = 0.0, 0, 0
        self.depth_counts = np.zeros(recursions + 1, np.int64)
        self.active_R = np.zeros(recursions, np.int64)
        self.agreed_R = np.zeros(recursions)
        self.dropped = 0.0
        self.used_T = np.zeros((1,), bool)

    def add(self, totals: BatchTotals) -> None:
        """Add a batch."""
        self.nll += float(totals.nll_sum)
        self.tokens += int(totals.tokens)
        self.bytes += int(totals.bytes)
        if totals.routing is None:
            return
        self.depth_counts += totals.routing.depth_counts
        self.active_R += totals.routing.active_R
        self.agreed_R += totals.routing.agreed_R
        self.dropped += float(totals.routing.dropped)
        self.used_T = self.used_T | np.asarray(totals.routing.used_T)


def _report(model: ModelConfig, sums: Mapping[Mode, _Sums]) -> dict[str, Any]:
    topk = sums["topk"]
    report: dict[str, Any] = {"validation_tokens": topk.tokens, "validation_bytes": topk.bytes}
    if model.routing.kind == "none":
        return report | _loss_entries("validation", topk)
    for mode, total in sums.items():
        prefix, inputs = f"validation_{mode}", total.depth_counts.sum()
        report |= _loss_entries(prefix, total)
        report[f"{prefix}_tokens_per_depth"] = (total.depth_counts / inputs).tolist()
        report[f"{prefix}_dead_token_ratio"] = float(1 - np.mean(total.used_T))
        if model.routing.kind == "token":
            report[f"{prefix}_dropped"] = total.dropped / float(inputs)
    if "threshold" in sums:
        report["validation_gap"] = report["validation_threshold_nll"] - report["validation_topk_nll"]
        if model.routing.kind == "expert":
            report["validation_threshold_accuracy"] = (topk.agreed_R / np.maximum(topk.active_R, 1)).tolist()
    return report


def _loss_entries(prefix: str, total: _Sums) -> dict[str, float]:
    return {
        f"{prefix}_nll": total.nll / total.tokens,
        f"{prefix}_bits_per_byte": total.nll / math.log(2) / max(total.bytes, 1),
    }

"""Loss of long text by a sliding window: nats per token and bits per byte, under both selection modes.

A window holds as many tokens as the model's context. It moves by ``stride`` tokens, and only the targets that no
earlier window scored count, so each of them (but those of the first window) sees at least ``context - stride`` tokens
before it. Letters: T context, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor_jax.config import Mode, PerfConfig
from mor_jax.data.packing import Row, cut_row, expand_row
from mor_jax.errors import require
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.evaluate.scoring import Scorer
from mor_jax.evaluate.text_bytes import target_bytes, token_lengths
from mor_jax.evaluate.validation import modes_of
from mor_jax.model.loss import target_mask
from mor_jax.model.parameters import Weights


@dataclass(frozen=True)
class Window:
    """One row of a text: what it holds and from which target on it counts."""

    row: Row
    """Up to T + 1 tokens."""
    first: int
    """Index of the first target that counts, 0..T-1."""


def text_stream(documents: Iterable[np.ndarray], before: Sequence[int] = ()) -> Row:
    """Join documents as training rows do.

    Args:
        documents: tokens of each, with the special tokens at its ends.
        before: tokens before the first, a document of their own: its first token then is a target, too.
    """
    pieces = [np.asarray(tokens, np.int32) for tokens in (before, *documents) if len(tokens)]
    if not pieces:
        return Row(np.zeros(0, np.int32), np.zeros(0, np.int64))
    return Row(np.concatenate(pieces), np.cumsum([0, *(len(piece) for piece in pieces[:-1])]))


def windows(stream: Row, context: int, stride: int) -> Iterator[Window]:
    """Cut a stream into windows; the last one is moved back so that it is full, as top-k seats count by row length.

    Args:
        stream: of ``text_stream``.
        context: T, tokens of a model input.
        stride: tokens that a window moves by, 1..T.

    Raises:
        UserError: a stride outside 1..T.
    """
    require(1 <= stride <= context, f"stride={stride} is outside 1..context_length={context}")
    scored, last = 0, max(0, len(stream.tokens) - 1 - context)
    targets = len(stream.tokens) - 1
    offset = 0
    while scored < targets:
        offset = min(offset, last)
        yield Window(cut_row(stream, offset, context + 1), first=scored - offset)
        scored = min(targets, offset + context)
        offset += stride


def sliding_losses(
    weights: Weights,
    perf: PerfConfig,
    streams: Mapping[str, Row],
    tokenizer: Any,
    *,
    batch_rows: int,
    stride: int | None = None,
    max_depth: int | None = None,
    modes: tuple[Mode, ...] | None = None,
    text_bytes: Mapping[str, int] | None = None,
    within_documents: bool = False,
) -> dict[str, Any]:
    """Measure a model on long texts.

    Args:
        weights: the model.
        perf: of its run; see ``scoring_perf``.
        streams: text by the name of its source, of ``text_stream``.
        tokenizer: says how many bytes a token stands for.
        batch_rows: rows at a time; rounded up to a multiple of the devices.
        stride: see ``windows``; None is half the context.
        max_depth: cap on the passes of a token; None is none.
        modes: None takes all that the model can be evaluated in.
        text_bytes: UTF-8 bytes of the texts of every source, where they are known: exact whatever the tokenizer loses.
        within_documents: see ``validation_losses``.

    Returns:
        ``{"stride", "context", "max_depth", "sources": {name: {"tokens", "bytes", "MODE_nll", "MODE_bits_per_byte"}}}``
        with a last source ``all``; MODE is `topk` (looks ahead) or `threshold` (causal) for expert-choice, and left out
        where there is nothing to select ahead (``nll``, ``bits_per_byte``).
    """
    if max_depth is not None:
        weights = cap_depth(weights, max_depth)
    model = weights.config
    stride = max(1, model.context_length // 2) if stride is None else stride
    if modes is None:
        modes = modes_of(weights) if model.routing.kind == "expert" else ("topk",)
    lengths_2V = token_lengths(tokenizer, model.vocab_size)
    sources: dict[str, dict[str, float]] = {name: {} for name in streams}
    for mode in modes:
        scorer = Scorer(weights, perf, mode=mode)
        rows = -(-batch_rows // scorer.devices) * scorer.devices
        prefix = f"{mode}_" if model.routing.kind == "expert" else ""
        for name, stream in streams.items():
            found = windows(stream, model.context_length, stride)
            sources[name] |= _measure(scorer, found, lengths_2V, rows, prefix, within_documents)
    for name, size in (text_bytes or {}).items():
        whole = expand_row(streams[name], len(streams[name].tokens))
        counted = target_bytes(lengths_2V, whole["tokens"][None], whole["positions"][None])
        sources[name]["bytes"] += size - int(counted.sum())
    total = _total(sources)
    return {
        "stride": stride,
        "context": model.context_length,
        "max_depth": max_depth,
        "sources": {name: _report(sums) for name, sums in (*sources.items(), ("all", total))},
    }


def _measure(
    scorer: Scorer, found: Iterator[Window], lengths_2V: np.ndarray, rows: int, prefix: str, within_documents: bool
) -> dict[str, float]:
    model = scorer.model
    nll, tokens, size = 0.0, 0, 0
    for batch, first_B in _batches(found, model.context_length, rows):
        scores = scorer(batch)
        mask_BT = target_mask(model, batch["segment_ids"], within_documents=within_documents)
        mask_BT = mask_BT & (np.arange(mask_BT.shape[1])[None, :] >= first_B[:, None])
        nll += float(np.sum(scores.nll_BT[mask_BT], dtype=np.float64))
        tokens += int(np.count_nonzero(mask_BT))
        size += int(target_bytes(lengths_2V, batch["tokens"], batch["positions"])[mask_BT].sum())
    return {f"{prefix}nll_sum": nll, "tokens": tokens, "bytes": size}


def _batches(found: Iterator[Window], context: int, rows: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield (batch [rows, T+1], first target that counts [rows]); the last batch ends with empty rows."""
    while True:
        taken = [window for _, window in zip(range(rows), found, strict=False)]
        if not taken:
            return
        empty = Window(Row(np.zeros(0, np.int32), np.zeros(0, np.int64)), 0)
        taken += [empty] * (rows - len(taken))
        expanded = [expand_row(window.row, context + 1) for window in taken]
        batch = {name: np.stack([row[name] for row in expanded]) for name in expanded[0]}
        yield batch, np.array([window.first for window in taken])


def _total(sources: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for sums in sources.values():
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value
    return total


def _report(sums: Mapping[str, float]) -> dict[str, float]:
    report: dict[str, float] = {"tokens": sums["tokens"], "bytes": sums["bytes"]}
    for name, nll in sums.items():
        if name.endswith("nll_sum"):
            prefix = name.removesuffix("nll_sum")
            report[f"{prefix}nll"] = nll / max(sums["tokens"], 1)
            report[f"{prefix}bits_per_byte"] = nll / math.log(2) / max(sums["bytes"], 1)
    return report

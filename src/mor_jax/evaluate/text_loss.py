"""`mor eval RUN --text FILE`: loss on any text by a sliding window, by source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor_jax.data.packing import Row
from mor_jax.data.readers import read_documents
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluate.sliding import sliding_losses, text_stream
from mor_jax.runs.restore import RestoredRun


def text_losses(
    run: RestoredRun,
    files: Sequence[Path],
    *,
    stride: int | None = None,
    max_depth: int | None = None,
    within_documents: bool = False,
) -> dict[str, Any]:
    """Measure a run on text files.

    Args:
        run: of ``interop.sources.open_run``.
        files: text, jsonl or parquet, plain or compressed; documents with a field ``source`` are reported by it, the
            others by the file's name.
        stride: tokens that the window moves by; None is half the context.
        max_depth: cap on the passes of a token.
        within_documents: see ``validation_losses``.

    Returns:
        See ``sliding_losses``.

    Raises:
        UserError: a file that cannot be read, or a stride or cap out of range.
    """
    train, (streams, sizes) = run.config.train, read_streams(files, run.tokenizer)
    return sliding_losses(
        run.weights,
        run.config.perf,
        streams,
        run.tokenizer,
        batch_rows=min(train.eval_rows, train.batch_size),
        stride=stride,
        max_depth=max_depth,
        text_bytes=sizes,
        within_documents=within_documents,
    )


def read_streams(files: Sequence[Path], tokenizer: Tokenizer) -> tuple[dict[str, Row], dict[str, int]]:
    """Read and tokenise files: one stream of joined documents per source, and the bytes of its texts."""
    texts: dict[str, list[str]] = {}
    for file in files:
        for document in read_documents(file):
            texts.setdefault(document.source or file.name, []).append(document.text)
    sizes = {name: sum(len(text.encode("utf-8")) for text in documents) for name, documents in texts.items()}
    before = () if tokenizer.special.before else (tokenizer.special.start_id,)
    streams = {name: text_stream(tokenizer.encode_documents(documents), before) for name, documents in texts.items()}
    return streams, sizes


def text_summary(losses: dict[str, Any]) -> str:
    """Say a result of ``sliding_losses`` as a table, one line per source."""
    figures = [name for name in losses["sources"]["all"] if name.endswith(("nll", "bits_per_byte"))]
    lines = [f"{'source':16s} {'tokens':>10s} " + " ".join(f"{name:>24s}" for name in figures)]
    for name, values in losses["sources"].items():
        cells = " ".join(f"{values[figure]:24.4f}" for figure in figures)
        lines.append(f"{name:16s} {values['tokens']:10d} {cells}")
    return "\n".join(lines)

"""How many tokens of how many prompts are read at a time, where nobody says: by the device, and the longest text."""

import dataclasses

from mor_jax.infer.engine_options import EngineOptions

_USUAL, _LONG = 128, 1024
_ROWS, _SEQUENCES_PER_ROW = 4, 8
_MOST_TOKENS = _ROWS * _LONG
"""Of a chunk, beyond four rows: all rows are computed, whether they hold a prompt or not."""
_LONG_TEXTS = 4096
"""Tokens of a sequence beyond which prompts of thousands are expected, that only large chunks read fast."""


def with_prefill_sizes(options: EngineOptions, platform: str, context_length: int) -> EngineOptions:
    """Settle ``prefill_chunk`` and ``prefill_rows``.

    A dispatch is followed by one chunk, so its rows bound how many sequences start per dispatch: of N that decode 16
    steps at a time, N / 16 end with every dispatch where completions have 256 tokens, N / 8 where they have 128.
    A GPU reads 1,024 tokens at a time 3.7 times as fast at 8,192 tokens of prompt, and 4.7 times at 32,768, as 128
    (vanilla at 360M on an H100, experiments/serving/README.md), but short prompts would pay for what they do not fill.

    Args:
        options: as the user gave them.
        platform: of the device that reads.
        context_length: of the model, the longest sequence where the options name none.

    Returns:
        Options where both are numbers.
    """
    large = platform == "gpu" and (options.max_length or context_length) > _LONG_TEXTS
    chunk = options.prefill_chunk or (_LONG if large else _USUAL)
    rows = max(_ROWS, min(options.max_running // _SEQUENCES_PER_ROW, _MOST_TOKENS // chunk))
    return dataclasses.replace(options, prefill_chunk=chunk, prefill_rows=options.prefill_rows or rows)


def reads_alone(options: EngineOptions, context_length: int) -> bool:
    """Say of settled options whether a text that nobody reads beside is read by a program of one row.

    The usual program computes all its rows, and copies or attends to the pages of each: the others' tokens would wait
    for rows that hold nothing. A second program is compiled where texts are long enough to be read for many chunks, or
    rows are many.
    """
    rows = options.prefill_rows or _ROWS
    return rows > _ROWS or (rows > 1 and (options.max_length or context_length) > _LONG_TEXTS)

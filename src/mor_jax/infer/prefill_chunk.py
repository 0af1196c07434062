"""How many tokens of how many prompts are read at a time, where nobody says: by the device, and the longest text."""

import dataclasses

from mor_jax.infer.engine_options import EngineOptions

_USUAL, _LONG = 128, 1024
_LONG_TEXTS = 4096
"""Tokens of a sequence beyond which prompts of thousands are expected, that only large chunks read fast."""


def with_prefill_chunk(options: EngineOptions, platform: str, context_length: int) -> EngineOptions:
    """Settle ``prefill_chunk``.

    A GPU reads 1,024 tokens at a time 3.7 times as fast at 8,192 tokens of prompt, and 4.7 times at 32,768, as 128
    (vanilla at 360M on an H100, experiments/serving/README.md), but short prompts would pay for what they do not fill.

    Args:
        options: as the user gave them.
        platform: of the device that reads.
        context_length: of the model, the longest sequence where the options name none.

    Returns:
        Options whose ``prefill_chunk`` is a number.
    """
    if options.prefill_chunk is not None:
        return options
    large = platform == "gpu" and (options.max_length or context_length) > _LONG_TEXTS
    return dataclasses.replace(options, prefill_chunk=_LONG if large else _USUAL)


def reads_alone(options: EngineOptions, context_length: int) -> bool:
    """Say whether a text that nobody reads beside is read by a program of one row.

    The usual program computes all its rows, and copies or attends to the pages of each: the others' tokens would wait
    for rows that hold nothing. A second program is compiled where texts are long enough to be read for many chunks.
    """
    return options.prefill_rows > 1 and (options.max_length or context_length) > _LONG_TEXTS

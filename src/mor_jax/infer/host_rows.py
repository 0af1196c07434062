"""What the host knows of requests, as rows of the arrays that the device takes.

Letters: B rows of prompts, T tokens of a chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mor_jax.data.special_tokens import MOST_STOP_IDS
from mor_jax.infer.engine_state import Control
from mor_jax.infer.places import Progress


def admit(control: Control, index: int, progress: Progress, *, order: int, budget: int) -> None:
    """Let the request of a place start: its text has been read but for the last token.

    Args:
        control: changed.
        index: the place.
        progress: of its request.
        order: requests start by it.
        budget: passes per token.
    """
    request, rows = progress.request, control.requests
    sampling = request.sampling
    values = (
        (control.admit, True),
        (control.token, progress.text[-1]),
        (control.position, progress.end),
        (rows.order, order),
        (rows.remaining, request.max_tokens - progress.generated),
        (rows.stop_tokens, (request.stop_tokens + (-1,) * MOST_STOP_IDS)[:MOST_STOP_IDS]),
        (rows.max_depth, budget),
        (rows.stops_at, request.max_tokens - request.min_tokens),
        (rows.has_bias, bool(sampling.logit_bias)),
        (rows.has_alternatives, request.alternatives > 0),
        (rows.sampling.temperature_E, sampling.temperature),
        (rows.sampling.top_k_E, sampling.top_k),
        (rows.sampling.top_p_E, sampling.top_p),
        (rows.sampling.seed_E, sampling.seed),
    )
    for array, value in values:
        array[index] = value


class PromptRows(NamedTuple):
    """Arguments of ``prefill`` between the cache and the targets."""

    place_B: np.ndarray
    tokens_BT: np.ndarray
    start_B: np.ndarray
    count_B: np.ndarray
    max_depth_B: np.ndarray


def prompt_rows(
    reading: Sequence[tuple[int, Progress, int]], rows: int, chunk: int, places: int
) -> tuple[PromptRows, np.ndarray | None]:
    """Return the next chunk of some texts, and the tokens to score, if any.

    Args:
        reading: place, request and its budget of passes, at most ``rows``.
        rows: B.
        chunk: T.
        places: of the engine; rows that read nothing name one beyond them.
    """
    place_B, targets_BT = np.full(rows, places, np.int32), np.full((rows, chunk), -1, np.int32)
    tokens_BT, (start_B, count_B, max_depth_B) = np.zeros((rows, chunk), np.int32), np.zeros((3, rows), np.int32)
    for row, (index, progress, budget) in enumerate(reading):
        begin, count = progress.read, min(chunk, progress.unread)
        place_B[row], start_B[row], count_B[row], max_depth_B[row] = index, begin, count, budget
        tokens_BT[row, :count] = progress.text[begin : begin + count]
        if progress.request.score_prompt:
            targets_BT[row, :count] = progress.text[begin + 1 : begin + count + 1]
    scored = any(progress.request.score_prompt for _, progress, _ in reading)
    return PromptRows(place_B, tokens_BT, start_B, count_B, max_depth_B), targets_BT if scored else None

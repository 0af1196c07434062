"""What few requests ask for beside tokens, as the host hands it out.

Letters: K most likely tokens, T tokens of a prompt, F packed fields.
"""

from typing import Any

import jax
import numpy as np

from mor_jax.infer.engine_state import unpack_alternatives
from mor_jax.infer.places import Progress
from mor_jax.infer.request import PromptScores, Ranked


def ranked_tokens(token_K: Any, log_probability_K: Any, count: int) -> Ranked:
    """The first ones; ids that no tokenizer knows, of minus infinity, come last and are left out."""
    pairs = zip(token_K[:count].tolist(), log_probability_K[:count].tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value > -np.inf)


def prompt_scores(progress: Progress) -> PromptScores:
    """Fetch what the chunks of a prompt gave."""
    count = progress.request.alternatives
    if not progress.scores:
        return PromptScores((), ())
    # cut on the host: on the device every length would be a program
    whole = jax.device_get([packed_BTF for packed_BTF, _, _ in progress.scores])
    parts = [packed_BTF[row, :size] for packed_BTF, (_, row, size) in zip(whole, progress.scores, strict=True)]
    scores_TF = np.concatenate(parts)
    values_T = np.ascontiguousarray(scores_TF[:, 0]).view(np.float32).tolist()
    if not count:
        return PromptScores(values_T, ())
    found = unpack_alternatives(scores_TF[:, 1:])
    ranked = [ranked_tokens(*row, count) for row in zip(found.token, found.log_probability, strict=True)]
    return PromptScores(values_T, ranked)

"""What few requests ask for beside tokens: which of it can be served, and what of it the host makes for them.

Letters: K most likely tokens, T tokens of a prompt, F packed fields.
"""

from typing import Any

import jax
import numpy as np

from mor_jax.errors import require
from mor_jax.infer.engine_state import unpack_alternatives
from mor_jax.infer.places import Place
from mor_jax.infer.request import PromptScores, Ranked, Request
from mor_jax.infer.sampling import MOST_ALTERNATIVES


def check_extras(request: Request, vocabulary: int, cuts: bool) -> None:
    """Raise ``UserError`` for values out of range, and for what an engine without cuts does not serve.

    Args:
        request: any.
        vocabulary: ids that may be drawn.
        cuts: of the engine.
    """
    sampling = request.sampling
    low, most = request.min_tokens, request.max_tokens
    require(0 <= low <= most, f"min_tokens={low} is outside 0..max_tokens={most}")
    told = request.alternatives
    require(0 <= told <= MOST_ALTERNATIVES, f"logprobs={told} is outside 0..{MOST_ALTERNATIVES}")
    strange = next((t for t, _ in sampling.logit_bias if not 0 <= t < vocabulary), None)
    require(strange is None, f"logit_bias={{{strange}: ...}} is outside 0..{vocabulary - 1}")
    asked = {
        f"top_k={sampling.top_k}": sampling.top_k > 0,
        f"top_p={sampling.top_p}": sampling.top_p < 1,
        "logit_bias={...}": bool(sampling.logit_bias),
        f"min_tokens={low}": low > 0,
        f"logprobs={told}": told > 0,
    }
    refused = [name for name, asks in asked.items() if asks and not cuts]
    require(not refused, f"{', '.join(refused)} needs an engine with cuts=True")


def ranked_tokens(token_K: Any, log_probability_K: Any, count: int) -> Ranked:
    """The first ones; ids that no tokenizer knows, of minus infinity, come last and are left out."""
    pairs = zip(token_K[:count].tolist(), log_probability_K[:count].tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value > -np.inf)


def prompt_scores(place: Place) -> PromptScores:
    """Fetch what the chunks of a prompt gave."""
    count = place.request.alternatives
    if not place.scores:
        return PromptScores((), ())
    # cut on the host: on the device every length would be a program
    whole = jax.device_get([packed_BTF for packed_BTF, _, _ in place.scores])
    parts = [packed_BTF[row, :size] for packed_BTF, (_, row, size) in zip(whole, place.scores, strict=True)]
    scores_TF = np.concatenate(parts)
    values_T = np.ascontiguousarray(scores_TF[:, 0]).view(np.float32).tolist()
    if not count:
        return PromptScores(values_T, ())
    found = unpack_alternatives(scores_TF[:, 1:])
    ranked = [ranked_tokens(*row, count) for row in zip(found.token, found.log_probability, strict=True)]
    return PromptScores(values_T, ranked)

"""Which requests an engine can serve at all."""

from mor_jax.data.special_tokens import MOST_STOP_IDS
from mor_jax.errors import require
from mor_jax.infer.request import Request
from mor_jax.infer.sampling import MOST_ALTERNATIVES


def check_request(request: Request, *, vocabulary: int, known_tokens: int | None, max_length: int, cuts: bool) -> None:
    """Raise ``UserError`` if a request can never be served, whatever pages there are.

    Args:
        request: any.
        vocabulary: of the model.
        known_tokens: ids that may be drawn; None is all.
        max_length: tokens of prompt and completion.
        cuts: of the engine.
    """
    length = len(request.prompt) + request.max_tokens
    require(len(request.prompt) > 0, "the prompt holds no token")
    require(request.max_tokens >= 0, f"max_tokens={request.max_tokens} must not be negative")
    stops = len(request.stop_tokens)
    require(stops <= MOST_STOP_IDS, f"stop_tokens holds {stops} tokens, more than {MOST_STOP_IDS}")
    outside = next((t for t in request.prompt if not 0 <= t < vocabulary), None)
    require(outside is None, f"prompt token {outside} is outside 0..{vocabulary - 1}")
    outside = next((t for t in request.stop_tokens if not 0 <= t < vocabulary), None)
    require(outside is None, f"stop_tokens: {outside} is outside 0..{vocabulary - 1}")
    require(
        length <= max_length,
        f"prompt ({len(request.prompt)} tokens) and max_tokens={request.max_tokens} exceed max_length={max_length}",
    )
    require(request.max_depth is None or request.max_depth >= 1, f"max_depth={request.max_depth} must be at least 1")
    _check_extras(request, known_tokens or vocabulary, cuts)


def _check_extras(request: Request, vocabulary: int, cuts: bool) -> None:
    """What is out of range, or an engine without cuts does not serve; ``vocabulary``: ids that may be drawn."""
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

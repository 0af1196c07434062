"""The loss-free router bias: state that travels beside the parameters, but is never trained by gradient (table 14)."""

from typing import Any

from mor_jax.array_types import Array, Float, Params

ROUTER_STATE = "router_state"


def split_router_state(params: Params) -> tuple[dict[str, Any], Float[Array, " R"] | None]:
    """Take the router bias out of an imported parameter tree.

    Args:
        params: parameter tree, perhaps with the extra entry ``router_state/bias`` (float32 [R]).

    Returns:
        (the tree of trained parameters, the bias or None).
    """
    trained = {name: value for name, value in params.items() if name != ROUTER_STATE}
    return trained, params[ROUTER_STATE]["bias"] if ROUTER_STATE in params else None

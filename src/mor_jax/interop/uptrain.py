"""The first weights of a run from another model: uptraining (paper section 4.2, table 12)."""

import logging
import math
from pathlib import Path

import jax

from mor_jax.config import Config, ModelConfig
from mor_jax.errors import require
from mor_jax.interop.assemble import leaf_shapes
from mor_jax.interop.sources import open_model
from mor_jax.model.parameters import split_router_state
from mor_jax.model.sharing import share_layers
from mor_jax.runs.state import InitialWeights

_log = logging.getLogger(__name__)


def initial_weights(config: Config) -> InitialWeights | None:
    """Load what ``config.init`` names and build the run's model from it.

    A full model is shared by the released rules, with fresh routers; a model of the run's own shape is taken as it is.

    Args:
        config: of the run.

    Returns:
        Host parameters with the tokenizer they belong to; None where the run starts at random.

    Raises:
        UserError: a folder that cannot be loaded, or a model that the run's cannot be built from.
    """
    if not config.init.source:
        return None
    folder = Path(config.init.source)
    loaded = open_model(folder)
    _check_constants(loaded.model, config)
    params, bias_R, _ = split_router_state(loaded.params)
    if leaf_shapes(loaded.model) == leaf_shapes(config.model):
        built = params
    else:
        require(
            loaded.model.recursion.sharing == "none",
            f"init.from={config.init.source!r} has sharing={loaded.model.recursion.sharing!r} and parameters that "
            f"are not shaped like this run's; only a full model can be shared anew",
        )
        key = jax.random.key(config.train.seed)
        built = share_layers(loaded.model, params, config.model, config.init.strategy, key=key, seed=config.train.seed)
    hash_ = None if loaded.tokenizer is None else loaded.tokenizer.hash
    return InitialWeights(
        params=built,
        tokenizer_hash=hash_,
        special=None if loaded.tokenizer is None else loaded.tokenizer.special,
        origin=f"{loaded.origin} ({config.init.strategy})",
        router_bias_R=bias_R if config.model.routing.is_loss_free else None,
    )


def _check_constants(model: ModelConfig, config: Config) -> None:
    """Refuse constants under which the weights would mean something else; no shape shows them.

    Raises:
        UserError: names every one that differs, with the flag that adopts it.
    """
    differing = [
        f"--model.{name} {getattr(model, name)} (now {getattr(config.model, name)})"
        for name in ("rope_theta", "norm_epsilon")
        if not math.isclose(getattr(model, name), getattr(config.model, name), rel_tol=1e-6)  # some hold float32
    ]
    require(not differing, f"init.from={config.init.source!r} was trained with other constants: {', '.join(differing)}")
    restarted = model.attend_across_documents and model.rotary_positions == "document"
    if restarted and config.model.rotary_positions == "row":
        _log.info("init.from=%r was trained with positions that restart; this run's do not", config.init.source)

"""Start a recursive or MoR model from a full one (paper section 4.2, table 12: uptraining), by the released rules.

A full model of N layers is first thinned to the layers that the sharing unrolls to; then each of the L unique layers
of the shared block (letters: L R N) takes the weights of one of them, or the mean of those that it replaces.
"""

import dataclasses
from typing import Any, get_args

import jax
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import InitStrategy, ModelConfig
from mor_jax.errors import require
from mor_jax.model.modern_parts import NAMES
from mor_jax.model.relaxation import lora_from_residuals
from mor_jax.model.transformer import init_params

Strategy = InitStrategy
_SAME = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")


def _spread(first: int, last: int, count: int) -> list[int]:
    """Integers evenly spread over first..last, halves rounded to even (Python's rounding, as released)."""
    return [round(float(x)) for x in np.linspace(first, last, count)]


def kept_layers(config: ModelConfig) -> list[int]:
    """Layers of the full model that survive thinning, in order.

    With one recursion nothing is thinned: the strategies pick from all layers.
    """
    recursion, total = config.recursion, config.num_layers
    if recursion.num_recursions == 1:
        return list(range(total))
    inner = config.block_depth * recursion.num_recursions
    if recursion.has_middle:
        return [0, *_spread(1, total - 2, inner), total - 1]
    return _spread(0, total - 1, inner)


def source_layers(config: ModelConfig, strategy: Strategy, seed: int = 0) -> list[list[int]]:
    """List the layers of the full model that each layer of the shared block is made from: one, but for `average`.

    Args:
        config: the recursive model; ``num_layers`` is the full model's.
        strategy: `stepwise` spreads over the thinned stack, `lower` and `upper` take its first and last layers,
            `random` draws, and `average` takes all layers that will share.
        seed: of numpy's legacy generator, for `random`.

    Returns:
        Ascending layer numbers.

    Raises:
        UserError: an unknown strategy, or a model without sharing.
    """
    allowed = get_args(Strategy)
    require(strategy in allowed, f"init.strategy={strategy!r} is not one of {', '.join(map(repr, allowed))}")
    recursion, depth = config.recursion, config.block_depth
    require(recursion.sharing != "none", "uptraining needs a model that shares layers, but recursion.sharing='none'")
    kept = kept_layers(config)
    first, last = (1, len(kept) - 2) if recursion.has_middle else (0, len(kept) - 1)
    inner = kept[first : last + 1]
    if strategy == "average":
        width = len(inner) // depth
        if recursion.is_sequence:
            return [inner[j * width : (j + 1) * width] for j in range(depth)]
        return [inner[j::depth] for j in range(depth)]
    if strategy == "lower":
        chosen = inner[:depth]
    elif strategy == "upper":
        chosen = inner[-depth:]
    else:
        places = _spread(first, last, depth)
        if strategy == "random":
            drawn = np.random.RandomState(seed).choice(np.arange(first, last + 1), depth, replace=False)
            places = sorted(int(place) for place in drawn)
        chosen = [kept[place] for place in places]
    return [[layer] for layer in chosen]


def unrolled_sources(config: ModelConfig) -> list[list[int]]:
    """Return [R][L] layers of the full model that recursion r's layer l stands for."""
    recursion, depth = config.recursion, config.block_depth
    kept = kept_layers(config)
    inner = kept[1:-1] if recursion.has_middle else kept
    count = recursion.num_recursions
    if recursion.is_sequence:
        return [[inner[layer * count + r] for layer in range(depth)] for r in range(count)]
    return [[inner[r * depth + layer] for layer in range(depth)] for r in range(count)]


def share_layers(
    full: ModelConfig, params: Params, config: ModelConfig, strategy: Strategy, *, key: jax.Array, seed: int = 0
) -> dict[str, Any]:
    """Build the parameters of a recursive or MoR model from a full model's.

    Args:
        full: the full model (sharing `none`).
        params: its parameter tree.
        config: the model to build, of the same sizes; ``num_layers`` is the full model's.
        strategy: see ``source_layers``.
        key: random key of fresh routers.
        seed: of the strategy `random`.

    Returns:
        Parameter tree of numpy arrays: embedding, head, final norm and unique layers are copied, routers are fresh.
        Norms that recursions do not share start out equal; low-rank updates start as the best ones of their rank that
        bring every recursion back towards the layers it stands for.

    Raises:
        UserError: models that do not fit each other, or what ``source_layers`` refuses.
    """
    sources = source_layers(config, strategy, seed)
    require(full.recursion.sharing == "none", f"the full model has recursion.sharing={full.recursion.sharing!r}")
    differing = [
        f"{n}: {getattr(full, n)} -> {getattr(config, n)}" for n in _SAME if getattr(full, n) != getattr(config, n)
    ]
    require(not differing, f"the models differ in {', '.join(differing)}")
    require(
        full.tie_embeddings or not config.tie_embeddings,
        "tie_embeddings=True would drop the full model's own output head (set tie_embeddings=False)",
    )
    _check_parts(full, config)
    params = jax.tree.map(np.asarray, dict(params))

    def shared(leaf_NX: np.ndarray) -> np.ndarray:
        return np.stack([leaf_NX[group[0]] if len(group) == 1 else leaf_NX[group].mean(axis=0) for group in sources])

    # only these are computed: jit drops the rest
    fresh = jax.jit(lambda key: _fresh(init_params(config, key)))(key)
    built: dict[str, Any] = {name: params[name] for name in ("embedding", "final_norm")}
    built |= {"block": jax.tree.map(shared, params["block"]), **jax.tree.map(np.asarray, fresh)}
    if not config.tie_embeddings:
        head = params["head"]["kernel"] if "head" in params else params["embedding"]["embedding"].T
        built["head"] = {"kernel": np.ascontiguousarray(head)}
    if config.recursion.has_middle:
        for name, layer in (("first", 0), ("last", -1)):
            built[name] = jax.tree.map(lambda leaf_NX, layer=layer: leaf_NX[layer].copy(), params["block"])
    if config.recursion.relaxation.lora_rank:
        stands_for = unrolled_sources(config)
        built["lora"] = lora_from_residuals(config, built["block"], params["block"], stands_for)
    if config.recursion.relaxation.encoding:
        built["encoding"] = {"scale": np.ones((config.recursion.num_recursions, config.d_model), np.float32)}
    if not config.recursion.share_norms:
        count = config.recursion.num_recursions
        norms = {name: built["block"].pop(name) for name in ("attention_norm", "ffn_norm")}
        built["block_norms"] = jax.tree.map(lambda leaf_LD: np.stack([leaf_LD] * count), norms)
    return built


def _fresh(params: Params) -> dict[str, Any]:
    return {name: params[name] for name in ("router", "aux_router", *NAMES) if name in params}


def _check_parts(full: ModelConfig, config: ModelConfig) -> None:
    """Refuse parts that the recursive model would have to learn anew, or that mean something else in it."""
    old, new = full.parts.qk_norm, config.parts.qk_norm
    require(old == new, f"the models differ in parts.qk_norm: {old!r} -> {new!r}")
    require(
        not full.parts.value_residual,
        "parts.value_residual=True cannot be uptrained: a shared block has no share of the first layer's values",
    )


def full_config(config: ModelConfig) -> ModelConfig:
    """Return the full model that a recursive or MoR model of these sizes can start from."""
    plain = ModelConfig()
    return dataclasses.replace(config, recursion=plain.recursion, routing=plain.routing)

"""The official release's model description, to and from ``ModelConfig``.

A description is a JSON object with the keys of ``KEYS``. What the release does not compute with has one normal form,
so that ``describe(parse(d)) == d`` for descriptions in it:

- ``z_coeff`` without ``z_loss``, and ``alpha`` without a router function, are the release's defaults 0.001 and 0.1;
- ``update_cache`` is true only where the release obeys it: expert-choice with middle_cycle;
- ``tie_word_embeddings_config`` is true for recursive models, whose head the release never ties.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.config import io as config_io
from mor_jax.errors import UserError, require, shown

logger = logging.getLogger(__name__)

KEYS = ("model_kind", "model", "recursive", "kv_sharing", "mor")
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
}
_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "num_hidden_layers_requested": "num_layers",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "context_length",
}
_MODEL_KEYS = {*_FIXED, *_SIZES, "num_hidden_layers", "tie_word_embeddings_config", "tie_word_embeddings_effective"}
_RECURSIVE_KEYS = {"num_recursion", "sharing", "ln_share", "base_depth"}
_KV_KEYS = {"num_recursion", "sharing", "update_cache"}
_MOR_KEYS = {"type", "router_type", "temp", "z_loss", "z_coeff"}
_EXPERT_KEYS = {"router_func", "alpha", "gating", "sampling", "coeff", "cap_warmup_step"}
_TOKEN_KEYS = {"router_func", "alpha", "gating", "balancing", "coeff", "u", "bal_warmup_step"}
_DEFAULT_ALPHA, _DEFAULT_Z = 0.1, 0.001


def parse(description: Mapping[str, Any]) -> ModelConfig:
    """Build the model's configuration; other keys of the description are ignored.

    The compute dtype is float32, and token-choice gets seats for every token, so that no execution drops any: the
    release has no seats.

    Raises:
        UserError: every missing or unknown key at once, a model that the release itself cannot run, or a value that
            breaks a rule of ``ModelConfig``.
    """
    _check_keys(description)
    model, recursive, kv = (description[name] for name in ("model", "recursive", "kv_sharing"))
    for name, value in _FIXED.items():
        require(model[name] == value, f"model.{name}={model[name]!r}: only {value!r} is supported")
    recursion = RecursionConfig() if recursive is None else _parse_recursion(recursive, kv, description["mor"])
    sizes = {ours: model[official] for official, ours in _SIZES.items()}
    sizes |= {"tie_embeddings": model["tie_word_embeddings_effective"], "dtype": "float32"}
    sizes |= {"attend_across_documents": True, "rotary_positions": "row"}  # it knows nothing of documents
    routing = RoutingConfig() if description["mor"] is None else _parse_routing(description["mor"], recursion)
    shared = {"recursion": config_io.to_dict(recursion), "routing": config_io.to_dict(routing)}
    config = _with_released_depth(config_io.from_dict(ModelConfig, {**sizes, **shared}, "model"))
    require(
        config.unrolled_depth == model["num_hidden_layers"],
        f"model.num_hidden_layers={model['num_hidden_layers']}, but {model['num_hidden_layers_requested']} layers "
        f"with this sharing keep {config.unrolled_depth}",
    )
    _check_released(config)
    if recursion.kv_strategy != "recursion" and config.unrolled_depth != config.num_layers:
        logger.warning("the release mixes up cache slots when layers are dropped under KV sharing; mor_jax does not")
    return config


def describe(config: ModelConfig) -> dict[str, Any]:
    """Return the release's description of a model.

    Raises:
        UserError: naming every field that asks for what the release does not have.
    """
    _check_expressible(config)
    recursive, kind = config.recursion, config.routing.kind
    plain = recursive.sharing == "none"
    sharing = {"num_recursion": recursive.num_recursions, "sharing": recursive.sharing}
    tie = config.tie_embeddings or (kind == "none" and not plain)
    shares_kv = recursive.kv_strategy != "recursion"
    return {
        "model_kind": "vanilla" if plain else "recursive" if kind == "none" else f"mor_{kind}",
        "model": {
            **{official: getattr(config, ours) for official, ours in _SIZES.items()},
            **_FIXED,
            "num_hidden_layers": config.unrolled_depth,
            "tie_word_embeddings_config": tie,
            "tie_word_embeddings_effective": config.tie_embeddings,
        },
        "recursive": None
        if plain
        else {**sharing, "ln_share": recursive.share_norms, "base_depth": config.block_depth},
        "kv_sharing": {**sharing, "update_cache": recursive.kv_strategy == "shared_update"} if shares_kv else None,
        "mor": None if kind == "none" else _describe_routing(config),
    }


def refuse_unshared(kv_sharing: Any, mor: Any) -> None:
    """Refuse what the release can switch on beside layers that share no parameters.

    Raises:
        UserError: naming the section and the reason.
    """
    require(
        kv_sharing is None,
        "kv_sharing without recursive: layers with parameters of their own read the keys and values of earlier ones; "
        "mor_jax shares keys and values only between recursions of shared parameters",
    )
    require(mor is None, "mor without recursive: a router needs recursions of shared parameters to choose among")


def _check_keys(description: Mapping[str, Any]) -> None:
    if description.get("recursive") is None:
        refuse_unshared(description.get("kv_sharing"), description.get("mor"))
    missing = [name for name in KEYS if name not in description]
    require(not missing, f"the description lacks {', '.join(missing)}")
    kind = description["model_kind"]
    kinds = ("vanilla", "recursive", "mor_expert", "mor_token")
    require(kind in kinds, f"model_kind={kind!r} is not one of {', '.join(map(repr, kinds))}")
    expected: dict[str, set[str]] = {"model": _MODEL_KEYS}
    if kind != "vanilla":
        expected["recursive"] = _RECURSIVE_KEYS
        if description["kv_sharing"] is not None:
            expected["kv_sharing"] = _KV_KEYS
    if kind.startswith("mor_"):
        branch = kind.removeprefix("mor_")
        expected["mor"] = _MOR_KEYS | ({"capacity", "expert"} if branch == "expert" else {"token"})
        expected[f"mor.{branch}"] = _EXPERT_KEYS if branch == "expert" else _TOKEN_KEYS
    problems = [
        f"{name}={description[name]!r} does not fit model_kind={kind!r}"
        for name in KEYS[1:]
        if name not in expected and description[name] is not None
    ]
    for where, keys in expected.items():
        section: Any = description
        for part in where.split("."):
            section = section.get(part) if isinstance(section, Mapping) else None
        if not isinstance(section, Mapping):
            problems.append(f"{where} is not an object")
            continue
        problems += [f"{where}.{key} is missing" for key in sorted(keys - set(section))]
        problems += [f"{where}.{key} is unknown" for key in sorted(set(section) - keys)]
    require(not problems, f"the description does not describe a released model: {'; '.join(problems)}")


def _parse_recursion(
    recursive: Mapping[str, Any], kv: Mapping[str, Any] | None, mor: Mapping[str, Any] | None
) -> RecursionConfig:
    strategy = "recursion"
    if kv is not None:
        for name in ("num_recursion", "sharing"):
            require(
                kv[name] == recursive[name],
                f"kv_sharing.{name}={kv[name]!r} differs from recursive.{name}={recursive[name]!r}",
            )
        obeys = mor is not None and mor["type"] == "expert" and recursive["sharing"] == "middle_cycle"
        strategy = "shared_update" if kv["update_cache"] and obeys else "shared"
    values = {
        "num_recursions": recursive["num_recursion"],
        "sharing": recursive["sharing"],
        "share_norms": recursive["ln_share"],
        "kv_strategy": strategy,
        "base_depth": recursive["base_depth"],
    }
    return config_io.from_dict(RecursionConfig, values, "recursive")


def _with_released_depth(config: ModelConfig) -> ModelConfig:
    """Drop a `base_depth` that the released rounding gives anyway."""
    rounded = dataclasses.replace(config, recursion=dataclasses.replace(config.recursion, base_depth=None))
    return rounded if rounded.block_depth == config.block_depth else config


def _parse_routing(mor: Mapping[str, Any], recursion: RecursionConfig) -> RoutingConfig:
    kind = mor["type"]
    own = mor[kind]
    plain_score = own["router_func"] is None
    common: dict[str, Any] = {
        "kind": kind,
        "router": mor["router_type"],
        "router_expansion": 2 if mor["router_type"] == "wide_mlp" else None,
        "temperature": _real(mor, "temp"),
        "z_loss_coefficient": _real(mor, "z_coeff") if mor["z_loss"] else 0.0,
        "score": "none" if plain_score else own["router_func"],
        "alpha": 1.0 if plain_score else _real(own, "alpha"),
        "gating": own["gating"],
    }
    if kind == "token":
        values = {
            "balancing": own["balancing"] or "none",
            "balancing_coefficient": _real(own, "coeff"),
            "bias_update_rate": _real(own, "u"),
            "balance_warmup_steps": own["bal_warmup_step"],
            "capacity_slack": _seats_for_all(recursion),
        }
        return config_io.from_dict(RoutingConfig, {**common, **values}, "mor")
    require(
        own["cap_warmup_step"] is not None,
        "mor.expert.cap_warmup_step=None stands for the trainer's num_warmup_steps x gradient_accumulation_steps, "
        "which a description does not hold: put the number there",
    )
    capacities = tuple(map(float, mor["capacity"]))
    count = recursion.num_recursions
    values = {
        "capacities": None if capacities == tuple((count - r) / count for r in range(count)) else capacities,
        "capacity_warmup_steps": own["cap_warmup_step"],
        "sampling": own["sampling"] or "none",
        "sampling_coefficient": _real(own, "coeff"),
    }
    return config_io.from_dict(RoutingConfig, {**common, **values}, "mor")


def _real(section: Mapping[str, Any], name: str) -> float:
    """A number, also one that YAML reads as a text: 1e-3."""
    try:
        return float(section[name])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"mor: {name}={shown(section[name])} is not a number") from error


def _seats_for_all(recursion: RecursionConfig) -> float:
    return float(recursion.num_recursions + 1)


def _describe_routing(config: ModelConfig) -> dict[str, Any]:
    routing = config.routing
    scored = routing.score != "none"
    own: dict[str, Any] = {
        "router_func": routing.score if scored else None,
        "alpha": routing.alpha if scored else _DEFAULT_ALPHA,
        "gating": routing.gating,
    }
    common = {
        "type": routing.kind,
        "router_type": routing.router,
        "temp": routing.temperature,
        "z_loss": routing.z_loss_coefficient > 0,
        "z_coeff": routing.z_loss_coefficient or _DEFAULT_Z,
    }
    if routing.kind == "token":
        own |= {
            "balancing": None if routing.balancing == "none" else routing.balancing,
            "coeff": routing.balancing_coefficient,
            "u": routing.bias_update_rate,
            "bal_warmup_step": routing.balance_warmup_steps,
        }
        return {**common, "token": own}
    own |= {
        "sampling": None if routing.sampling == "none" else routing.sampling,
        "coeff": routing.sampling_coefficient,
        "cap_warmup_step": routing.capacity_warmup_steps,
    }
    return {**common, "capacity": list(config.capacities), "expert": own}


def _check_released(config: ModelConfig) -> None:
    """Refuse what the release has a switch for, but crashes on or never computes."""
    recursion = config.recursion
    problems = []
    if config.routing.kind == "token" and recursion.sharing == "cycle":
        problems.append("token-choice with sharing='cycle' crashes in the release (use 'middle_cycle')")
    if recursion.kv_strategy != "recursion" and recursion.sharing == "middle_sequence":
        problems.append("KV sharing with sharing='middle_sequence' crashes in the release")
    if recursion.sharing != "none" and config.routing.kind == "none" and config.tie_embeddings:
        problems.append(
            "tie_embeddings=True: the release never ties the head of a recursive model without a router (untie it: "
            "head/kernel = embedding transposed)"
        )
    require(not problems, "; ".join(problems))


def _check_expressible(config: ModelConfig) -> None:
    """Refuse our extensions, which the release would silently compute otherwise."""
    routing, recursion = config.routing, config.recursion
    problems = []
    obeys_update = routing.kind == "expert" and recursion.sharing == "middle_cycle"
    if recursion.kv_strategy == "shared_update" and not obeys_update:
        problems.append("recursion.kv_strategy='shared_update' works only in expert-choice with middle_cycle")
    if recursion.relaxation.lora_rank or recursion.relaxation.encoding:
        problems.append("recursion.relaxation: its checkpoints hold no low-rank updates or recursion encodings")
    problems += [f"parts.{part}: it has no such part" for part in config.parts.changes]
    if not config.attend_across_documents:
        problems.append("attend_across_documents=False: it has no document masks")
    elif config.rotary_positions == "document":
        problems.append("rotary_positions='document': its positions are those of the row, also where attention crosses")
    if routing.kind != "none":
        if routing.hidden_expansion not in (0, 2):
            problems.append(
                f"routing.router_expansion={routing.router_expansion}: its MLP routers have width 2 x d_model"
            )
        if routing.residual != "paper":
            problems.append(f"routing.residual={routing.residual!r}: it multiplies the whole block output by the gate")
        if routing.score == "none" and routing.alpha != 1:
            problems.append(f"routing.alpha={routing.alpha}: it has no factor on raw scores")
        if routing.capacity_multiple != 1:
            problems.append(f"routing.capacity_multiple={routing.capacity_multiple}: it does not round k up")
        if routing.random:
            problems.append("routing.random=True: descriptions have no random router")
        if routing.boundaries is not None:
            problems.append(f"routing.boundaries={routing.boundaries}: it has no calibrated boundaries")
    if problems:
        raise UserError(f"the official release cannot express this model: {'; '.join(problems)}")
    _check_released(config)

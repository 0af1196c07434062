"""A run folder of the official release: its YAML configuration and its tensors.

The YAML has the sections ``recursive``, ``kv_sharing`` and ``mor`` with the keys of ``interop.description`` and a
switch ``enable``; the sizes stand in the Hugging Face ``config.json`` that its trainer saves beside the weights.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.data.special_tokens import read_object
from mor_jax.errors import UserError, reason, require, shown
from mor_jax.interop.description import refuse_unshared
from mor_jax.interop.tensor_files import TensorFiles

logger = logging.getLogger(__name__)
_SECTIONS = ("recursive", "kv_sharing", "mor")
_MODEL_DEFAULTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_hidden_layers",
    "max_position_embeddings",
)
_MOR_DEFAULTS: dict[str, Any] = {"router_type": "linear", "temp": 1.0, "z_loss": False, "z_coeff": 0.001}
_EXPERT_DEFAULTS: dict[str, Any] = {
    "router_func": "sigmoid",
    "alpha": 0.1,
    "gating": "weighted",
    "sampling": "aux_loss",
    "coeff": 0.001,
    "cap_warmup_step": 0,
}
_TOKEN_DEFAULTS: dict[str, Any] = {
    "router_func": "softmax",
    "alpha": 1.0,
    "gating": "weighted",
    "balancing": "loss",
    "coeff": 0.1,
    "u": 0.001,
    "bal_warmup_step": 0,
}


def read_yaml(folder: Path) -> dict[str, Any]:
    """Read the one YAML file of a folder; a section that is absent is one that is not enabled.

    Raises:
        UserError: there is none or more than one, it cannot be read, or a section is no mapping.
    """
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    require(len(paths) == 1, f"{folder} holds {len(paths)} YAML files ({', '.join(p.name for p in paths)}), not one")
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{paths[0]}: reading YAML needs the extra: pip install -e '.[hf]'") from error
    try:
        values = yaml.safe_load(paths[0].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{paths[0]}: not readable YAML ({reason(error)})") from error
    require(isinstance(values, dict), f"{paths[0]}: not a mapping")
    sections = {name: {"enable": False} if values.get(name) is None else values[name] for name in _SECTIONS}
    wrong = [f"{name}={section!r}" for name, section in sections.items() if not isinstance(section, dict)]
    require(not wrong, f"{paths[0]}: {', '.join(wrong)}: not a section with keys of its own")
    absent = [name for name in _SECTIONS if name not in values]
    require(len(absent) < len(_SECTIONS), f"{paths[0]}: has none of the sections {', '.join(_SECTIONS)}")
    return {**values, **sections}


def write_configuration(folder: Path, description: Mapping[str, Any]) -> None:
    """Write a description as the YAML file and config.json that ``describe_folder`` reads."""
    import yaml

    model = dict(description["model"])
    tied = model.pop("tie_word_embeddings_config")
    model.pop("tie_word_embeddings_effective")
    sizes = {"model_type": "llama", **model, "tie_word_embeddings": tied}
    sections: dict[str, Any] = {"num_hidden_layers_requested": model["num_hidden_layers_requested"]}
    for name in _SECTIONS:
        values = description[name]
        sections[name] = {"enable": False} if values is None else {"enable": True, **values}
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")


def describe_folder(folder: Path, files: TensorFiles) -> dict[str, Any]:
    """Build the description that ``official.load`` takes from a released run folder.

    Args:
        folder: holds one YAML file and a Hugging Face config.json.
        files: the folder's tensors; they tell whether the head is tied.

    Raises:
        UserError: files or fields that are missing (all named).
    """
    values, sizes = read_yaml(folder), _read_sizes(folder)
    _refuse_extras(values)
    recursive, kv, mor = (_enabled(values[name]) for name in _SECTIONS)
    if recursive is None:
        refuse_unshared(kv, mor)
    kind = "vanilla" if recursive is None else "recursive" if mor is None else f"mor_{mor.get('type')}"
    tied = bool(sizes.get("tie_word_embeddings", True))
    names = set(files.names())
    effective = "lm_head.weight" not in names or (tied and kind != "recursive")
    model = {**_MODEL_DEFAULTS, **{name: sizes[name] for name in _MODEL_DEFAULTS if name in sizes}}
    model |= {name: sizes[name] for name in _SIZES}
    model["head_dim"] = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    requested = values.get("num_hidden_layers_requested", sizes["num_hidden_layers"])
    model |= {
        "num_hidden_layers_requested": requested,
        "tie_word_embeddings_config": True if kind == "recursive" else tied,
        "tie_word_embeddings_effective": effective,
    }
    description = {"model_kind": kind, "model": model, "recursive": None, "kv_sharing": None, "mor": None}
    if recursive is not None:
        count, sharing = recursive["num_recursion"], recursive["sharing"]
        known = type(count) is int and 0 < count < 2**16
        require(known, f"recursive.num_recursion={shown(count)} is not a number of recursions")
        description["recursive"] = {
            "num_recursion": count,
            "sharing": sharing,
            "ln_share": recursive.get("ln_share", True),
            "base_depth": recursive.get("base_depth"),
        }
        if kv is not None:
            description["kv_sharing"] = {
                "num_recursion": kv.get("num_recursion") or count,  # the release fills in null
                "sharing": kv.get("sharing") or sharing,
                "update_cache": bool(kv.get("update_cache")),
            }
    if mor is not None and recursive is not None:
        description["mor"] = _describe_mor(mor, recursive["num_recursion"], values)
    return description


def _refuse_extras(values: Mapping[str, Any]) -> None:
    """Refuse switches that a description cannot hold."""
    problems = []
    relaxation = values.get("relaxation")
    if isinstance(relaxation, dict) and relaxation.get("enable"):
        problems.append(f"relaxation.method={relaxation.get('method')!r}: its adapters cannot be imported")
    mor = _enabled(values["mor"])
    if mor is not None and mor.get("rand_router"):
        problems.append("mor.rand_router=true: a random router has no weights to import")
    require(not problems, f"the released run cannot be read: {'; '.join(problems)}")


def _warmup_steps(own: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Forward calls of the capacity warm-up; null stands for the learning rate's warm-up times the accumulation."""
    steps = own.get("cap_warmup_step", 0)
    if steps is not None:
        return steps
    warmup = values.get("num_warmup_steps")
    if warmup is None:
        raise UserError("mor.expert.cap_warmup_step and num_warmup_steps are both null: put a number there")
    steps = int(warmup) * int(values.get("gradient_accumulation_steps") or 1)
    logger.warning("capacity warm-up: num_warmup_steps x gradient_accumulation_steps = %d", steps)
    return steps


def _enabled(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return section if section.get("enable", True) else None


def _read_sizes(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    sizes = read_object(path)
    missing = [name for name in _SIZES if name not in sizes]
    require(not missing, f"{path}: {', '.join(missing)} missing")
    return sizes


def _describe_mor(mor: Mapping[str, Any], count: int, values: Mapping[str, Any]) -> dict[str, Any]:
    kind = mor.get("type")
    require(kind in ("expert", "token"), f"mor.type={kind!r} is not 'expert' or 'token'")
    own = mor.get(str(kind)) or {}
    common = {"type": kind, **{name: mor.get(name, value) for name, value in _MOR_DEFAULTS.items()}}
    if kind == "token":
        return {**common, "token": {name: own.get(name, value) for name, value in _TOKEN_DEFAULTS.items()}}
    return {
        **common,
        "capacity": _capacities(mor.get("capacity"), count),
        "expert": {
            **{name: own.get(name, value) for name, value in _EXPERT_DEFAULTS.items()},
            "cap_warmup_step": _warmup_steps(own, values),
        },
    }


def _capacities(value: Any, count: int) -> list[float]:
    """The release writes "1.0,0.66,0.33", a list, or nothing for the default."""
    if value is None or value == "":
        return [(count - r) / count for r in range(count)]
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise UserError(f"mor.capacity={value!r} is not a list of numbers") from error

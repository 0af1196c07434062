"""Llama-architecture checkpoints of Hugging Face (Llama, TinyLlama, SmolLM, SmolLM2), in and out.

A folder of `config.json` and safetensors becomes a vanilla model. A vanilla or recursive model becomes one, with
the recursions unrolled into layers of their own, so that `transformers` runs it. Weights are the same numbers in both
directions; the module names of the official release are Llama's, so `interop.tensors` serves here too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import Dtype, LoraTarget, ModelConfig
from mor_jax.data.special_tokens import read_object
from mor_jax.errors import UserError, require, shown
from mor_jax.interop.assemble import Progress, assemble, check_names, lazily, take_apart
from mor_jax.interop.tensor_files import TensorFiles
from mor_jax.interop.tensors import Tensor, tensors
from mor_jax.model.relaxation import update_of

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "context_length",
}
_NULLABLE = ("num_key_value_heads", "head_dim")
"""Optional sizes, for which null is another word for leaving them out."""
_REAL = ("rms_norm_eps", "rope_theta", "initializer_range")
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_THETA = 10_000.0
_LARGEST = 1e38  # of float32


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a Hugging Face configuration of the Llama architecture.

    Args:
        values: the JSON object.
        where: the file, for messages.

    Returns:
        A vanilla model with dtype float32.

    Raises:
        UserError: another architecture, missing sizes (all named), one that is no positive number, or rotary scaling,
            which is not supported.
    """
    kind = values.get("model_type")
    require(kind == "llama", f"{where}: model_type={kind!r} is not 'llama'")
    missing = [name for name in _SIZES if name not in values]
    require(not missing, f"{where}: {', '.join(missing)} missing")
    for name in (*_SIZES, *(name for name in (*_NULLABLE, "initializer_range") if name in values)):
        if name not in _NULLABLE or values[name] is not None:
            _check_number(values[name], name, where)
    for name, value in _FIXED.items():
        found = values.get(name, value)
        require(found == value, f"{where}: {name}={found!r}: only {value!r} is supported")
    tied = values.get("tie_word_embeddings", False)
    require(isinstance(tied, bool), f"{where}: tie_word_embeddings={tied!r} is neither true nor false")
    heads, theta = values["num_attention_heads"], _rotary_base(values, where)
    sizes: dict[str, Any] = {ours: values[name] for name, ours in _SIZES.items()}
    sizes["norm_epsilon"] = float(sizes["norm_epsilon"])
    try:
        return ModelConfig(
            **sizes,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            rope_theta=theta,
            init_std=float(values.get("initializer_range", ModelConfig().init_std)),
            tie_embeddings=tied,
            dtype="float32",
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_number(value: Any, name: str, where: str) -> None:
    whole = name.rpartition(".")[2] not in _REAL
    known = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    known = known and 0 < value < _LARGEST
    require(known, f"{where}: {name}={shown(value)} is not a positive {'integer' if whole else 'number'}")


def _rotary_base(values: Mapping[str, Any], where: str) -> float:
    """The base of the rotary angles, from the keys of either generation of transformers; scaling is refused.

    Raises:
        UserError: names the keys that ask for scaling, that contradict each other, or that hold no such setting.
    """
    said = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    kinds: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        settings = values.get(name)
        require(settings is None or isinstance(settings, dict), f"{where}: {name}={shown(settings)} is not an object")
        found = {f"{name}.{key}": settings[key] for key in ("rope_type", "type") if key in settings} if settings else {}
        kinds |= found
        if settings and "rope_theta" in settings:
            said[f"{name}.rope_theta"] = settings["rope_theta"]
        others = sorted(set(settings or ()) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        require(bool(found) or not others, f"{where}: {name}={shown(settings)} names no rope_type")
        _check_partial(settings or {}, f"{where}: {name}.")
    _check_partial(values, f"{where}: ")
    wrong = [f"{name}={kind!r}" for name, kind in kinds.items() if kind != "default"]
    plain = [f"{name}={kind!r}" for name, kind in kinds.items() if kind == "default"]
    against = f", although {' and '.join(plain)}" if wrong and plain else ""
    require(not wrong, f"{where}: {' and '.join(wrong)}{against}: rotary scaling is not supported")
    for name, value in said.items():
        _check_number(value, name, where)
    bases = {float(value) for value in said.values()}
    stated = " and ".join(f"{name}={value!r}" for name, value in said.items())
    require(len(bases) <= 1, f"{where}: {stated} contradict each other")
    return next(iter(bases), _THETA)


def _check_partial(settings: Mapping[str, Any], where: str) -> None:
    share = settings.get("partial_rotary_factor")
    require(share in (None, 1), f"{where}partial_rotary_factor={share!r}: only whole heads can be rotated")


def describe_config(
    model: ModelConfig, *, tokens: Mapping[str, Any] | None = None, dtype: Dtype = "float32"
) -> dict[str, Any]:
    """Write a vanilla or recursive model as a Hugging Face Llama configuration, recursions unrolled.

    Document masks and positions that restart with a document are no part of it: whoever runs a Llama passes one
    document per row, where neither changes anything.

    Args:
        model: the model.
        tokens: ids of special tokens, of ``exported_tokens.token_ids``.
        dtype: of the weights.

    Raises:
        UserError: names what plain Llama cannot express: a router, or keys and values shared between recursions.
    """
    check_expressible(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **describe_sizes(model),
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **(tokens or {}),
    }


def describe_sizes(model: ModelConfig) -> dict[str, Any]:
    """Return the sizes and constants of a model under the keys of a Hugging Face Llama configuration."""
    return {
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "num_hidden_layers": model.unrolled_depth,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        **_FIXED,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        # readers of either generation ignore the other's key
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }


def check_expressible(model: ModelConfig) -> None:
    """Refuse a model that plain Llama does not compute.

    Raises:
        UserError: all reasons at once.
    """
    problems = []
    if model.routing.kind != "none":
        problems.append(f"routing.kind={model.routing.kind!r}: Llama has no router (convert to 'mor' instead)")
    if model.recursion.kv_strategy != "recursion":
        problems.append(f"recursion.kv_strategy={model.recursion.kv_strategy!r}: every Llama layer has keys of its own")
    if model.recursion.relaxation.encoding:
        problems.append("recursion.relaxation.encoding=True: no Llama layer multiplies its output by a vector")
    problems += [f"parts.{part}: Llama has no such part" for part in model.parts.changes]
    require(not problems, f"plain Llama cannot express this model: {'; '.join(problems)}")


def read_config(folder: Path) -> ModelConfig:
    """Read the model's description of a Hugging Face folder.

    Raises:
        UserError: no readable config.json there, or one that ``parse_config`` refuses.
    """
    path = folder / "config.json"
    values = read_object(path)
    return parse_config(values, str(path))


def load(
    folder: Path, *, shardings: Any = None, lazy: bool = False, progress: Progress | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a Hugging Face folder into a vanilla model.

    Args:
        folder: config.json and safetensors (one file, or shards with an index) or PyTorch files; float32, bfloat16
            or float16.
        shardings: see ``assemble``: with it the host holds one tensor at a time, whatever the model's size.
        lazy: whether to return leaves that read their tensors when asked (``assemble.LazyLeaf``).
        progress: called with the name of every tensor read.

    Returns:
        (model, float32 parameter tree).

    Raises:
        UserError: a configuration or files that cannot be used, or tensors that do not fit - all named at once.
    """
    model, files = read_config(folder), TensorFiles(folder)
    listed = tensors(model)
    check_names(str(folder), listed, files, _is_buffer)
    if lazy:
        return model, lazily(model, listed, files.read)
    return model, assemble(model, listed, files.read, shardings=shardings, progress=progress)


def _is_buffer(name: str) -> bool:
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias"))


def key_map(model: ModelConfig) -> list[tuple[str, str]]:
    """List (Llama's name, our leaf with its index) of every tensor, unrolled layers included."""
    rows = []
    for tensor in tensors(model):
        index = "".join(f"[{i}]" if isinstance(i, int) else "[:]" for i in tensor.index)
        rows += [(name, "/".join(tensor.path) + index) for name in _written_names(tensor)]
    return rows


def written_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that ``unrolled`` yields, by name and in its order."""
    return {name: tensor.shape for tensor in tensors(model) for name in _written_names(tensor)}


def unrolled(model: ModelConfig, params: Params, progress: Progress | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of a plain Llama that computes what a vanilla or recursive model computes.

    A tied head is not written: Llama ties it again.

    Raises:
        UserError: see ``check_expressible``.
    """
    check_expressible(model)
    for tensor, value in take_apart(params, tensors(model)):
        for name in _written_names(tensor):
            update = _update(model, params, tensor, name)
            yield name, value if update is None else value + update
            if progress is not None:
                progress(name)


def _update(model: ModelConfig, params: Params, tensor: Tensor, name: str) -> np.ndarray | None:
    """What low-rank updates of this name's recursion add to a tensor, in Llama's layout; None is nothing."""
    target = tensor.path[-1]
    if tensor.path[0] != "block" or target not in model.recursion.relaxation.lora_targets or "lora" not in params:
        return None
    recursion = [tensor.name, *tensor.aliases].index(name)
    layer, *part = tensor.index
    update = update_of(model, params["lora"], cast(LoraTarget, target), recursion, cast(int, layer))[tuple(part)]
    return update.reshape(tensor.shape[::-1]).T


def _written_names(tensor: Tensor) -> list[str]:
    return [name for name in (tensor.name, *tensor.aliases) if name == tensor.name or name != "lm_head.weight"]

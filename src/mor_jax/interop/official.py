"""Weights of the official PyTorch release (raymin0223/mixture_of_recursions), in and out, bit for bit.

The release's expert-choice attention is taken as shared between recursions, as its commit 82c97f29 fixed it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError
from mor_jax.interop.assemble import assemble, leaf_shapes, take_apart
from mor_jax.interop.description import describe, parse
from mor_jax.interop.released import describe_folder, write_configuration
from mor_jax.interop.tensor_files import TensorFiles
from mor_jax.interop.tensors import Path, Tensor, attention_aliases, router_bias_name, tensors
from mor_jax.model.parameters import ROUTER_STATE, split_router_state

__all__ = ["describe", "export", "load", "read", "write_configuration"]
_log = logging.getLogger(__name__)
_BIAS_PATH = (ROUTER_STATE, "bias")


def load(description: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> tuple[ModelConfig, dict[str, Any]]:
    """Build a model from the release's description and tensors.

    Args:
        description: object with the keys ``model_kind``, ``model``, ``recursive``, ``kv_sharing`` and ``mor``
            (see ``interop.description``).
        state: float32 arrays by official state_dict name, matrices (out, in). A tied tensor is there once, under its
            first name; further names of it are accepted if they hold the same values.

    Returns:
        (configuration with dtype float32, parameter tree of numpy arrays). With loss-free balancing the tree holds
        the bias, which is not trained, as ``router_state/bias`` (see ``model.parameters.split_router_state``).

    Raises:
        UserError: a description that cannot be used, an untied-attention checkpoint of the early release, or tensors
            that are missing, unknown, misshaped, of another dtype or untied - all named at once.
    """
    config = parse(description)
    listed = _all_tensors(config)
    _check_state(config, listed, state)
    return config, assemble(config, listed, state.__getitem__)


def read(folder: FilePath) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a released run folder: YAML configuration, config.json with the sizes, and its tensors.

    Args:
        folder: tensors as safetensors, or as PyTorch `pytorch_model.bin` or `.pt` files, which are unpickled as plain
            tensors only, so nothing in them is executed (needs torch).

    Returns:
        See ``load``; bfloat16 and float16 tensors are widened.

    Raises:
        UserError: files that are missing or cannot be read, or what ``load`` refuses.
    """
    files = TensorFiles(folder, pt=True)
    try:
        description = describe_folder(folder, files)
        if description["recursive"] is not None and description["recursive"]["base_depth"] is None:
            description = _with_rounded_depth(description)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # fields of any kind
        known = isinstance(error, UserError) and str(folder) in str(error)
        words = str(error) if isinstance(error, UserError) else f"a field is missing or of a wrong type, {error!r}"
        raise error if known else UserError(f"{folder}: {words}") from error
    state = {name: files.read(name) for name in files.names()}
    try:
        return load(description, {name: _widened(value) for name, value in state.items()})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _with_rounded_depth(description: dict[str, Any]) -> dict[str, Any]:
    """Fill in the layer counts that the released rounding gives."""
    recursive, requested = description["recursive"], description["model"]["num_hidden_layers_requested"]
    unique = 2 if recursive["sharing"].startswith("middle_") else 0
    depth = (requested - unique) // recursive["num_recursion"]
    kept = unique + depth * recursive["num_recursion"]
    return {
        **description,
        "model": {**description["model"], "num_hidden_layers": kept},
        "recursive": {**recursive, "base_depth": depth},
    }


def _widened(value: np.ndarray) -> np.ndarray:
    return value if value.dtype.kind != "f" and value.dtype.name != "bfloat16" else value.astype(np.float32)


def export(config: ModelConfig, params: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write a model as the release's description and tensors: the inverse of ``load``, also for gradients.

    Args:
        config: the model.
        params: parameter tree, or a tree of gradients of the same form (a tied tensor appears once: its gradient is
            already the sum over its uses); with loss-free balancing including ``router_state/bias``. Running
            boundaries of expert-choice are left out, and that is logged.

    Returns:
        (description, float32 arrays by official name), each distinct tensor once.

    Raises:
        UserError: a model that the release cannot express, or a tree that does not fit the configuration.
    """
    description = describe(config)
    if "boundaries" in params.get(ROUTER_STATE, {}):
        _log.warning("the release has no place for the running boundaries of expert-choice: they are left out")
        params, bias_R, _ = split_router_state(params)
        params = params if bias_R is None else {**params, ROUTER_STATE: {"bias": bias_R}}
    if config.routing.gate_warmup_steps:
        _log.warning("the release has no warm-up of the gate: routing.gate_warmup_steps is left out")
    flat = {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    _check_leaves(_leaves(config), flat)
    return description, {tensor.name: value for tensor, value in take_apart(params, _all_tensors(config))}


def _all_tensors(config: ModelConfig) -> list[Tensor]:
    name = router_bias_name(config)
    bias = [] if name is None else [Tensor(name, (config.recursion.num_recursions,), _BIAS_PATH)]
    return tensors(config) + bias


def _leaves(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes of the parameter tree by path, with the router bias if the model has one."""
    shapes = leaf_shapes(config)
    if router_bias_name(config) is not None:
        shapes[_BIAS_PATH] = (config.recursion.num_recursions,)
    return shapes


def _check_state(config: ModelConfig, listed: list[Tensor], state: Mapping[str, np.ndarray]) -> None:
    known = {tensor.name: tensor for tensor in listed}
    tied = {alias: tensor.name for tensor in listed for alias in tensor.aliases}
    missing = sorted(known.keys() - state.keys())
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name}" for name in sorted(state.keys() - known.keys() - tied.keys())]
    for name, tensor in known.items():
        if name in state:
            problems += _misfits(name, state[name], tensor.shape)
    untied = [a for a, name in tied.items() if a in state and name in state and not _same(state[a], state[name])]
    problems += [f"untied {alias} differs from {tied[alias]}" for alias in sorted(untied)]
    if untied and set(untied) <= attention_aliases(config) and config.routing.kind == "expert":
        raise UserError(
            f"{len(untied)} attention tensors of later recursions differ from recursion 1's (first {untied[0]}): this "
            f"is a checkpoint of the early release 884fa5a, which by mistake gave every recursion attention of its own "
            f"(fixed upstream in 82c97f29); mor_jax shares it and cannot load these weights"
        )
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit the described model: {'; '.join(problems)}")


def _misfits(name: str, value: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if tuple(value.shape) != shape:
        problems.append(f"misshaped {name}: {tuple(value.shape)}, not {shape}")
    if value.dtype != np.float32:
        problems.append(f"wrong dtype of {name}: {value.dtype}, not float32")
    return problems


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _check_leaves(expected: dict[Path, tuple[int, ...]], flat: dict[Path, np.ndarray]) -> None:
    problems = [f"missing {'/'.join(path)}" for path in sorted(expected.keys() - flat.keys())]
    problems += [f"unknown {'/'.join(path)}" for path in sorted(flat.keys() - expected.keys())]
    for path in sorted(expected.keys() & flat.keys()):
        problems += _misfits("/".join(path), flat[path], expected[path])
    if problems:
        raise UserError(f"{len(problems)} parameters do not fit the configuration: {'; '.join(problems)}")

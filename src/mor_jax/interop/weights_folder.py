"""A folder of weights without a run: our configuration, our parameter names, tokenizer and model card.

Files: `config.json` (``ModelConfig``, with the format's name), `model.safetensors` or shards with an index,
`tokenizer.json`, `special_tokens.json`, `README.md`. Names are the parameter tree's paths joined by dots; the leaves of
the shared block, which are stacked by layer, are written one layer at a time (``block.3.ffn.down``): no reader or
writer holds a stack.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.config import io as config_io
from mor_jax.data.special_tokens import read_object
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.interop.assemble import Progress, assemble, check_names, lazily, leaf_shapes, take_apart
from mor_jax.interop.llama import describe_sizes
from mor_jax.interop.tensor_files import TensorFiles, write_shards
from mor_jax.interop.tensors import Tensor
from mor_jax.model.flops import count_parameters, paper_flops_per_token
from mor_jax.model.parameters import ROUTER_STATE

FORMAT = "mor_jax-weights-1"
_STACKED = "block"


def is_weights_folder(folder: Path) -> bool:
    """Whether a folder holds what ``save`` wrote."""
    try:
        return config_io.read_json(folder / "config.json").get("format") == FORMAT
    except (UserError, AttributeError):
        return False


def listing(model: ModelConfig, state: Iterable[str] = ()) -> list[Tensor]:
    """List every written tensor of a model, with these entries of ``router_state``; shapes are those in the tree."""
    listed = []
    for path, shape in leaf_shapes(model).items():
        if path[0] != _STACKED:
            listed.append(Tensor(".".join(path), shape, path))
            continue
        names = [".".join((_STACKED, str(layer), *path[1:])) for layer in range(model.block_depth)]
        listed += [Tensor(name, shape[1:], path, (layer,)) for layer, name in enumerate(names)]
    shape = (model.recursion.num_recursions,)
    return listed + [Tensor(f"{ROUTER_STATE}.{name}", shape, (ROUTER_STATE, name)) for name in state]


def named(model: ModelConfig, params: Params, progress: Progress | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 array) of every tensor, one at a time."""
    for tensor, value in take_apart(params, listing(model, params.get(ROUTER_STATE, ()))):
        yield tensor.name, value.astype(np.float32, copy=False)
        if progress is not None:
            progress(tensor.name)


def save(
    folder: Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    origin: str,
    progress: Progress | None = None,
) -> None:
    """Write a model into an existing, empty folder.

    Args:
        folder: to write into.
        model: its configuration.
        params: its parameter tree, perhaps with ``router_state``.
        tokenizer: saved beside it, if there is one.
        origin: where the weights come from, for the model card.
        progress: called with the name of every tensor written.
    """
    values = {
        "format": FORMAT,
        "model_type": "mor_jax",
        "architectures": ["MixtureOfRecursionsForCausalLM"],
        **describe_sizes(model),  # for readers that look for the usual keys; `model` is what counts
        "model": config_io.to_dict(model),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    shapes = {tensor.name: tensor.shape for tensor in listing(model, params.get(ROUTER_STATE, ()))}
    write_shards(folder, shapes, named(model, params, progress))
    (folder / "README.md").write_text(model_card(model, origin), encoding="utf-8")


def read_config(folder: Path) -> ModelConfig:
    """Read the configuration of a weights folder.

    Raises:
        UserError: it cannot be read or describes no model.
    """
    path = folder / "config.json"
    values = read_object(path)
    require(values.get("format") == FORMAT, f"{path}: its format is not {FORMAT!r}")
    try:
        return config_io.from_dict(ModelConfig, values.get("model"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load(
    folder: Path, *, shardings: Any = None, lazy: bool = False, progress: Progress | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a weights folder.

    Args:
        folder: written by ``save``.
        shardings: see ``assemble``.
        lazy: whether to return leaves that read their tensors when asked (``assemble.LazyLeaf``).
        progress: called with the name of every tensor read.

    Returns:
        (model, float32 parameter tree; with what the folder has of ``router_state``).

    Raises:
        UserError: files that cannot be used, or tensors that do not fit - all named at once.
    """
    model, files = read_config(folder), TensorFiles(folder)
    state = [name for name in ("bias", "boundaries") if f"{ROUTER_STATE}.{name}" in files.names()]
    listed = listing(model, state)
    check_names(str(folder), listed, files, lambda _: False)
    if lazy:
        return model, lazily(model, listed, files.read)
    if not state or shardings is None:
        return model, assemble(model, listed, files.read, shardings=shardings, progress=progress)
    params = assemble(model, listing(model), files.read, shardings=shardings, progress=progress)
    return model, {**params, ROUTER_STATE: {name: files.read(f"{ROUTER_STATE}.{name}") for name in state}}


def model_card(model: ModelConfig, origin: str) -> str:
    """Write the README of a weights folder."""
    count = count_parameters(model)
    recursion, routing = model.recursion, model.routing
    kinds = {
        "none": "no router: every token takes every pass",
        "expert": f"expert-choice routing, capacities {', '.join(f'{c:.3g}' for c in model.capacities)}",
        "token": "token-choice routing",
    }
    return f"""---
library_name: mor_jax
tags: [mixture-of-recursions, jax]
---

# A {"vanilla Transformer" if recursion.sharing == "none" else "Mixture-of-Recursions model"} of mor_jax

Origin of the weights: {origin}.

| | |
|---|---|
| parameters | {count.total:,} ({count.non_embedding:,} without embedding) |
| layers | {model.unrolled_depth} unrolled, {model.block_depth} in the shared block, sharing `{recursion.sharing}` |
| recursions | {recursion.num_recursions}, keys and values `{recursion.kv_strategy}` |
| routing | {kinds[routing.kind]} |
| width, vocabulary | {model.d_model}, {model.vocab_size} |
| heads | {model.num_heads} for queries, {model.num_kv_heads} for keys and values, of width {model.head_dim} |
| context | {model.context_length} tokens |
| forward FLOPs per token | {paper_flops_per_token(model):.3g} by the paper's count |

Load it with `mor_jax.load(folder)`. Expert-choice by top-k looks ahead along the sequence; generation and honest
evaluation use the causal `threshold` selection.
"""

"""PyTorch pickles of a checkpoint folder, of every age: ``torch.load(weights_only=True)``, which executes nothing.

It needs torch, which is no dependency.
"""

import importlib
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mor_jax.errors import UserError, require
from mor_jax.interop.shard_index import indexed_files

INDEX = "pytorch_model.bin.index.json"
_TRAINER = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""Beginnings of the names of what trainers keep beside the weights."""


def find(folder: Path, *, pt: bool) -> list[Path]:
    """Return the files that hold the model.

    Args:
        folder: of a checkpoint.
        pt: whether `.pt` files count where there is no `pytorch_model*.bin`.

    Raises:
        UserError: an index that cannot be used.
    """
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    if (folder / INDEX).is_file():
        return indexed_files(folder / INDEX)
    found = sorted(folder.glob("pytorch_model*.bin"))
    if not found and pt:
        found = sorted(path for path in folder.glob("*.pt") if not path.name.startswith(_TRAINER))
    return found


def load(path: Path) -> dict[str, Any]:
    """Read a file's tensors by name, those of a trainer's nested dictionary as well.

    Raises:
        UserError: torch is not installed, or the file holds anything but plain tensors by name.
    """
    try:
        # files from before torch 1.6 are no archives and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        loaded = _torch().load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ImportError as error:
        raise UserError(f"{path}: reading a PyTorch file needs torch, or convert it to safetensors first") from error
    except Exception as error:  # torch raises many kinds, and refuses pickles that would execute something
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"{path}: not a file of plain tensors ({type(error).__name__}: {''.join(first)})") from error
    nested = loaded
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            nested = loaded[name]
            break
    tensors = isinstance(nested, dict) and all(
        isinstance(name, str) and isinstance(value, _torch().Tensor) for name, value in nested.items()
    )
    if not tensors:
        raise UserError(f"{path}: not a dictionary of tensors by name")
    layouts = [f"{name} ({value.layout})" for name, value in nested.items() if str(value.layout) != "torch.strided"]
    require(not layouts, f"{path}: not plain tensors: {', '.join(layouts)}")
    return nested


def dtype(tensor: Any) -> str:
    """Return the name of a tensor's dtype as safetensors writes it, or torch's own."""
    words = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(words, words)


def array(tensor: Any, name: str) -> np.ndarray:
    """Return a tensor, or a parameter that asks for gradients, as an array in its own dtype."""
    plain = tensor.detach()
    try:
        if dtype(plain) == "BF16":
            return plain.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return plain.numpy()
    except (TypeError, RuntimeError) as error:  # quantised, and dtypes that numpy lacks
        raise UserError(f"{name} has dtype {dtype(plain)}, which cannot be read") from error


def _torch() -> Any:
    return importlib.import_module("torch")  # no dependency: type checkers need not find it

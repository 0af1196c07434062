"""Tensor files of a checkpoint folder, read one tensor at a time: safetensors (sharded or not) and PyTorch pickles.

Pickles are read by ``torch.load(weights_only=True)``, which executes nothing; it needs torch, which is no dependency.
"""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mor_jax.errors import UserError, require

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
"""Bytes of a written shard at most (a larger tensor gets a shard of its own)."""
_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class TensorFiles:
    """The tensors of a folder by name; nothing is read before it is asked for.

    Args:
        folder: holds `model.safetensors`, shards named by an index, or `pytorch_model.bin` / `.pt` files.

    Raises:
        UserError: there are no tensor files, they cannot be opened, or a PyTorch file is there without torch.
    """

    def __init__(self, folder: Path) -> None:
        require(folder.is_dir(), f"{folder} is no folder")
        self._where: dict[str, Any] = {}
        files = _safetensors_files(folder)
        for path in files:
            opened = _open_safetensors(path)
            self._where |= dict.fromkeys(opened.keys(), opened)
        if not files:
            for path in _torch_files(folder):
                loaded = _load_torch(path)
                self._where |= dict.fromkeys(loaded, loaded)
        require(bool(self._where), f"{folder} holds no *.safetensors, *.bin or *.pt file with tensors")

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        holder = self._where[name]
        return tuple(holder[name].shape if isinstance(holder, dict) else holder.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor without reading it: `F32`, `BF16`, `F16`, or another name."""
        holder = self._where[name]
        if not isinstance(holder, dict):
            return str(holder.get_slice(name).get_dtype())
        words = str(holder[name].dtype).removeprefix("torch.")
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(words, words)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its own dtype."""
        holder = self._where[name]
        if not isinstance(holder, dict):
            return holder.get_tensor(name)
        tensor = holder[name]
        if self.dtype(name) == "BF16":
            return tensor.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def is_float(dtype: str) -> bool:
    """Whether a dtype name of ``TensorFiles.dtype`` is one that weights may have."""
    return dtype in ("F32", "BF16", "F16")


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, holding one shard in memory at a time.

    Args:
        folder: exists.
        tensors: (name, array) pairs, made as they are consumed.
        shard_bytes: bytes of a shard at most.
    """
    from safetensors.numpy import save_file

    names_of: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        total += sum(array.nbytes for array in shard.values())
        names_of.append(list(shard))
        save_file(shard, folder / f"shard-{number}.safetensors", metadata={"format": "pt"})
    if len(names_of) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(names_of):
        file = f"model-{number + 1:05d}-of-{len(names_of):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield shard


def _safetensors_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        weight_map: Mapping[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / name for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: not an index of safetensors shards ({error!r})") from error
    missing = [path.name for path in files if not path.is_file()]
    require(not missing, f"{folder / INDEX} names shards that are not there: {', '.join(missing)}")
    return files


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import safe_open

        return safe_open(path, framework="numpy")
    except ImportError as error:
        raise UserError(f"{path}: reading safetensors needs the extra: pip install 'mor-jax[hf]'") from error
    except Exception as error:  # safetensors raises a bare error for damaged files
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _torch_files(folder: Path) -> list[Path]:
    weights = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")]
    return sorted(weights)


def _torch() -> Any:
    return importlib.import_module("torch")  # no dependency: type checkers need not find it


def _load_torch(path: Path) -> dict[str, Any]:
    try:
        loaded = _torch().load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError as error:
        raise UserError(f"{path}: reading a PyTorch file needs torch, or convert it to safetensors first") from error
    except Exception as error:  # torch raises many kinds, and refuses pickles that would execute something
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"{path}: not a file of plain tensors ({type(error).__name__}: {''.join(first)})") from error
    nested = loaded.get("state_dict", loaded.get("model", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(nested, dict) or not all(hasattr(value, "shape") for value in nested.values()):
        raise UserError(f"{path}: not a dictionary of tensors by name")
    return nested

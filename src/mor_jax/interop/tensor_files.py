"""Tensor files of a checkpoint folder, read one tensor at a time: safetensors (sharded or not) and PyTorch pickles.

Pickles are read by ``torch.load(weights_only=True)``, which executes nothing; it needs torch, which is no dependency.
"""

import importlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mor_jax.config import Dtype
from mor_jax.errors import UserError, require

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
"""Bytes of a written shard at most."""
_READABLE: dict[str, Any] = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPES: dict[Dtype, tuple[str, Any]] = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}


class TensorFiles:
    """The tensors of a folder by name; nothing is read before it is asked for, and no shard is mapped or held.

    Args:
        folder: holds `model.safetensors`, shards named by an index, or `pytorch_model.bin` / `.pt` files.

    Raises:
        UserError: there are no tensor files, they cannot be opened, or a PyTorch file is there without torch.
    """

    def __init__(self, folder: Path) -> None:
        require(folder.is_dir(), f"{folder} is no folder")
        self._where: dict[str, _Place | dict[str, Any]] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        files = _safetensors_files(folder)
        for path in files:
            for name, (shape, dtype, offset) in _read_header(path).items():
                self._where[name], self._about[name] = _Place(path, offset), (shape, dtype)
        for path in [] if files else _torch_files(folder):
            loaded = _load_torch(path)
            self._where |= dict.fromkeys(loaded, loaded)
            self._about |= {name: (tuple(value.shape), _torch_dtype(value)) for name, value in loaded.items()}
        require(bool(self._where), f"{folder} holds no *.safetensors, *.bin or *.pt file with tensors")

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._about[name][0]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor without reading it: `F32`, `BF16`, `F16`, or another name."""
        return self._about[name][1]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its own dtype."""
        holder = self._where[name]
        shape, dtype = self._about[name]
        if isinstance(holder, _Place):
            require(dtype in _READABLE, f"{holder.path}: {name} has dtype {dtype}, which cannot be read")
            array = np.fromfile(holder.path, _READABLE[dtype], math.prod(shape), offset=holder.offset)
            return array.reshape(shape)
        tensor = holder[name]
        if dtype == "BF16":
            return tensor.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class _Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int


def is_float(dtype: str) -> bool:
    """Whether a dtype name of ``TensorFiles.dtype`` is one that weights may have."""
    return dtype in ("F32", "BF16", "F16")


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, holding one tensor in memory at a time.

    safetensors' own writer wants all tensors of a file at once, so the files are written here; its format is a JSON
    header and the bytes.

    Args:
        folder: exists.
        shapes: shape of every tensor by name, in the order of ``tensors``.
        tensors: (name, array) pairs, made as they are consumed.
        dtype: to write; float32 arrays are rounded to it.
        shard_bytes: bytes of a shard at most (a larger tensor gets a shard of its own).
    """
    item = np.dtype(_DTYPES[dtype][1])
    sizes = {name: math.prod(shape) * item.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, shard_bytes)
    arrays = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}, sizes, _DTYPES[dtype][0]))
            for name in names:
                found, array = next(arrays)
                assert (found, array.shape) == (name, shapes[name]), (found, array.shape, name, shapes[name])
                stream.write(np.ascontiguousarray(array, item).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    """The length of the JSON in 8 bytes, and the JSON, padded so that the data is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + sizes[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape, dtype and place in the file of every tensor.

    safetensors checks the file, but maps all of it, and mapped pages count as memory: the tensors are read plainly.
    """
    try:
        from safetensors import safe_open

        with safe_open(path, framework="numpy"), path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length))
        return {
            name: (tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except ImportError as error:
        raise UserError(f"{path}: reading safetensors needs the extra: pip install 'mor-jax[hf]'") from error
    except Exception as error:  # safetensors raises a bare error for damaged files
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _torch_files(folder: Path) -> list[Path]:
    weights = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")]
    return sorted(weights)


def _torch() -> Any:
    return importlib.import_module("torch")  # no dependency: type checkers need not find it


def _torch_dtype(tensor: Any) -> str:
    words = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(words, words)


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

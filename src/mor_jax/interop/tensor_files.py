"""Tensor files of a checkpoint folder, read one tensor at a time: safetensors (sharded or not) and PyTorch pickles.

Which files of a folder are the model's is decided as `transformers` does it.
"""

import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mor_jax.config import Dtype
from mor_jax.errors import UserError, require
from mor_jax.interop import torch_files
from mor_jax.interop.shard_index import indexed_files

_log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BESIDE = ("adapter", "optimizer", "scheduler", "random_states")
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
        folder: holds `model.safetensors`, shards named by an index, or `pytorch_model.bin` files. What else lies there
            (adapters, an optimiser's state) is passed over.
        pt: whether the model may also lie in `.pt` files, as in a run of the official release.

    Raises:
        UserError: there are no tensor files, they cannot be opened, or a PyTorch file is there without torch.
    """

    def __init__(self, folder: Path, *, pt: bool = False) -> None:
        require(folder.is_dir(), f"{folder} is no folder")
        self._where: dict[str, _Location | dict[str, Any]] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        files = _safetensors_files(folder)
        for path in files:
            for name, (shape, dtype, offset) in _read_header(path).items():
                self._where[name], self._about[name] = _Location(path, offset), (shape, dtype)
        pickles = [] if files else torch_files.find(folder, pt=pt)
        for path in pickles:
            loaded = torch_files.load(path)
            self._where |= dict.fromkeys(loaded, loaded)
            self._about |= {name: (tuple(value.shape), torch_files.dtype(value)) for name, value in loaded.items()}
        expected = "*.safetensors, pytorch_model*.bin or *.pt" if pt else "*.safetensors or pytorch_model*.bin"
        require(bool(self._where), f"{folder} holds no {expected} file with tensors")
        _pass_over(folder, [*files, *pickles])

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
        if isinstance(holder, _Location):
            require(dtype in _READABLE, f"{holder.path}: {name} has dtype {dtype}, which cannot be read")
            array = np.fromfile(holder.path, _READABLE[dtype], math.prod(shape), offset=holder.offset)
            return array.reshape(shape)
        return torch_files.array(holder[name], name)


class _Location(NamedTuple):
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
    """The model's own files, as `transformers` takes them; without a usual name, all that are there."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / INDEX).is_file():
        return indexed_files(folder / INDEX)
    everything = sorted(folder.glob("*.safetensors"))
    shards = [path for path in everything if re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name)]
    return shards or [path for path in everything if not path.name.startswith(_BESIDE)]


def _pass_over(folder: Path, used: Iterable[Path]) -> None:
    """Say which files with tensors beside the model's are not read."""
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    left = sorted(path.name for path in folder.iterdir() if path.suffix in kinds and path not in set(used))
    if left:
        _log.warning("%s: passed over beside the model: %s", folder, ", ".join(left))


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
        raise UserError(f"{path}: reading safetensors needs the extra: pip install -e '.[hf]'") from error
    except Exception as error:  # safetensors raises a bare error for damaged files
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error

"""Fill a parameter tree from named tensors, one at a time, and take one apart again (letters: L R).

The tree may live in host memory or be built on devices, where the host never holds more than one tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError
from mor_jax.interop.tensor_files import TensorFiles, is_float
from mor_jax.interop.tensors import Index, Path, Tensor
from mor_jax.model.transformer import init_params

Progress = Callable[[str], None]


def leaf_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Return the shape of every leaf of a model's parameter tree by path."""
    tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {tuple(entry.key for entry in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Return leaves by path as a tree of dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def check_names(where: str, listed: Sequence[Tensor], files: TensorFiles, ignored: Callable[[str], bool]) -> None:
    """Compare the tensors that a model needs with those that there are.

    Args:
        where: the folder, for the message.
        listed: tensors of the model; an alias may be there beside its first name.
        files: what there is.
        ignored: names that carry no weights, such as rotary buffers.

    Raises:
        UserError: names every missing, unknown, misshaped and wrongly typed tensor, and every alias of other values.
    """
    names, aliases = set(files.names()), {alias for tensor in listed for alias in tensor.aliases}
    known = {tensor.name for tensor in listed}
    problems = [f"missing {tensor.name}" for tensor in listed if tensor.name not in names]
    problems += [f"unknown {name}" for name in sorted(names - known - aliases) if not ignored(name)]
    for tensor in listed:
        if tensor.name not in names:
            continue
        shape, dtype = files.shape(tensor.name), files.dtype(tensor.name)
        if shape != tensor.shape:
            problems.append(f"misshaped {tensor.name}: {shape}, not {tensor.shape}")
        if not is_float(dtype):
            problems.append(f"wrong dtype of {tensor.name}: {dtype}, not F32, BF16 or F16")
        problems += [
            f"untied {alias} differs from {tensor.name}"
            for alias in tensor.aliases
            if alias in names and not np.array_equal(files.read(alias), files.read(tensor.name))
        ]
    if problems:
        raise UserError(f"{where}: {len(problems)} tensors do not fit the model: {'; '.join(problems)}")


def assemble(
    config: ModelConfig,
    listed: Sequence[Tensor],
    read: Callable[[str], np.ndarray],
    *,
    shardings: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a float32 parameter tree from named tensors.

    Args:
        config: the model.
        listed: which tensor fills which part of which leaf; must cover every leaf. A path that the model does not
            have becomes a leaf of its own (such as the router bias); only on the host.
        read: gives a tensor by its name.
        shardings: tree of ``jax.sharding.Sharding`` to build the leaves on; None builds numpy arrays.
        progress: called with every name that was read.

    Returns:
        The tree.
    """
    shapes = leaf_shapes(config)
    shapes |= {t.path: t.shape for t in listed if t.path not in shapes}  # state beside the parameters
    if shardings is None:
        leaves: dict[Path, Any] = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    else:
        by_path = {tuple(e.key for e in path): s for path, s in jax.tree.leaves_with_path(shardings)}
        leaves = {path: _zeros(shape, by_path[path]) for path, shape in shapes.items()}
    for tensor in listed:
        value = _oriented(tensor, read(tensor.name))
        target = leaves[tensor.path]
        if isinstance(target, np.ndarray):
            target[tensor.index] = value.reshape(target[tensor.index].shape)
        else:
            part = jax.eval_shape(lambda leaf, index=tensor.index: leaf[index], target)
            leaves[tensor.path] = _write(tensor.index, target, value.reshape(part.shape))
        if progress is not None:
            progress(tensor.name)
    return nested(leaves)


@dataclass(frozen=True)
class LazyLeaf:
    """A leaf of a tree whose tensors are read when they are asked for: by layer, or all of them as an array."""

    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]
    """The tensors that fill it."""
    read: Callable[[str], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        """Always float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole leaf."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the whole leaf."""
        leaf = np.empty(self.shape, self.dtype)
        for tensor in self.parts:
            leaf[tensor.index] = _oriented(tensor, self.read(tensor.name)).reshape(leaf[tensor.index].shape)
        return leaf if dtype is None else leaf.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read what an index needs: one layer of a stack if it starts with an integer."""
        index = index if isinstance(index, tuple) else (index,)
        for tensor in self.parts:
            if tensor.index == index:
                shape = jax.eval_shape(lambda leaf: leaf[index], jax.ShapeDtypeStruct(self.shape, self.dtype)).shape
                return _oriented(tensor, self.read(tensor.name)).reshape(shape)
        first, *rest = index or (slice(None),)
        if not isinstance(first, int) or any(not t.index or not isinstance(t.index[0], int) for t in self.parts):
            return np.asarray(self)[index]
        layer = first % self.shape[0]
        own = tuple(dataclasses.replace(t, index=t.index[1:]) for t in self.parts if t.index[0] == layer)
        return np.asarray(LazyLeaf(self.shape[1:], own, self.read))[tuple(rest)]


def lazily(config: ModelConfig, listed: Sequence[Tensor], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Build the tree of ``assemble`` with leaves that read their tensors when they are asked for."""
    shapes = leaf_shapes(config)
    shapes |= {t.path: t.shape for t in listed if t.path not in shapes}
    parts: dict[Path, list[Tensor]] = {path: [] for path in shapes}
    for tensor in listed:
        parts[tensor.path].append(tensor)
    return nested({path: LazyLeaf(shape, tuple(parts[path]), read) for path, shape in shapes.items()})


def _oriented(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    return np.asarray(value.T if tensor.transposed else value, np.float32)


def _zeros(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()


def _write(index: Index, leaf: jax.Array, value: np.ndarray) -> jax.Array:
    """Write a part of a leaf in place: one compilation serves all layers."""
    integers = tuple(i for i in index if isinstance(i, int))
    return _writer(tuple(isinstance(i, int) for i in index), leaf.sharding)(leaf, value, integers)


@cache
def _writer(is_integer: tuple[bool, ...], sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    def write(leaf: jax.Array, value: jax.Array, integers: tuple[jax.Array, ...]) -> jax.Array:
        left = iter(integers)
        return leaf.at[tuple(next(left) if integer else slice(None) for integer in is_integer)].set(value)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def take_apart(params: Params, listed: Sequence[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield every listed tensor with its values in the foreign layout, made one at a time."""
    leaves = {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for tensor in listed:
        part = np.asarray(leaves[tensor.path][tensor.index])
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        value = part.reshape(shape)
        yield tensor, np.ascontiguousarray(value.T if tensor.transposed else value)

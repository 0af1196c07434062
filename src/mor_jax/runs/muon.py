"""Muon's update of the layers' matrices: Nesterov momentum, orthogonalised matrix by matrix (Newton-Schulz).

The momentum is split over the mesh like its parameter. The products need whole matrices: split ones would be summed
over the mesh fifteen times a step. So every device is handed some whole matrices and returns its parts of the result:

- by an all-to-all over `fsdp` and `tensor` each way: a device receives as many bytes as its own share has;
- the replicas along `data` and `context` take different matrices, and their results are summed (each is zero but in
  one place), so that more devices mean less arithmetic. `slice` is left alone: its network is slow.

Matrices of equal shape share a stack, whatever weight they are of, so that few places of it stay empty. Letters: M
matrices, D model width, X the other side (query heads, key/value heads or feed-forward), P places.

References: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (2025), for the scale.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mor_jax.mesh.axes import axis_size, current_mesh, on_shards

MOMENTUM = 0.95
"""Of Jordan et al.; AdamW's betas mean something else and stay those of the other parameters."""
RMS = 0.2
"""Root mean square of an update over its learning rate: AdamW's usual one, so that its learning rates carry over."""
MATRICES: Mapping[tuple[str, str], tuple[str | None, ...]] = {
    ("attention", "query"): ("embed", "heads", "head_dim"),
    ("attention", "key_value"): ("embed", None, "kv_heads", "head_dim"),
    ("attention", "output"): ("heads", "head_dim", "embed"),
    ("ffn", "gate_up"): ("embed", None, "ffn"),
    ("ffn", "down"): ("ffn", "embed"),
}
"""Logical axes of a layer's weights, by the last two keys of their path. `embed` is one side of the matrix and the
named others are the other; None, and what stands before (layers), count matrices: key and value are two of them, gate
and up too, and all heads of a projection are one."""
_TOGETHER = 8
"""Matrices whose products run at the same time: enough to fill a device, few enough to hold."""
_SHARDS, _REPLICAS = ("fsdp", "tensor"), ("data", "context")


def matrix_axes(path: Sequence[Any]) -> tuple[str | None, ...] | None:
    """Return the logical axes of a layer's weight without its layers; None for every other parameter."""
    return MATRICES.get(tuple(key.key for key in path[-2:]))  # pyright: ignore[reportArgumentType]


def scale_by_orthogonal() -> optax.GradientTransformation:
    """Replace every matrix U S V^T of ``MATRICES`` by about U V^T, with a root mean square of ``RMS``."""
    return optax.stateless(lambda updates, _: orthogonalize(updates))


def orthogonalize(updates: Any) -> Any:
    """Orthogonalise a tree of float32 leaves, all of ``MATRICES``, under the ambient mesh if there is one."""
    found, structure = jax.tree.flatten_with_path(updates)
    axes = [_axes(path, leaf) for path, leaf in found]
    leaves = [leaf for _, leaf in found]
    return structure.unflatten(on_shards(lambda shards: _on_shards(shards, axes), (axes,), axes)(leaves))


def _axes(path: Any, leaf: jax.Array) -> tuple[str | None, ...]:
    axes = matrix_axes(path)
    assert axes is not None, path
    return (*("layers",) * (leaf.ndim - len(axes)), *axes)


def _on_shards(shards: Sequence[jax.Array], axes: Sequence[tuple[str | None, ...]]) -> list[jax.Array]:
    """Orthogonalise one device's parts of all leaves."""
    stacks = [_to_stack(shard, names) for shard, names in zip(shards, axes, strict=True)]
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, x_MDX in enumerate(stacks):  # alone, a device would only copy: every leaf by itself
        groups[i if current_mesh() is None else x_MDX.shape[1:]].append(i)
    results: list[Any] = [None] * len(stacks)
    for members in groups.values():
        whole = _on_whole(jnp.concatenate([stacks[i] for i in members]))
        parts = jnp.split(whole, list(_ends(stacks[i].shape[0] for i in members))[:-1])
        for i, part in zip(members, parts, strict=True):
            results[i] = _from_stack(part, shards[i].shape, axes[i])
    return results


def _ends(sizes: Any) -> Any:
    total = 0
    for size in sizes:
        total += size
        yield total


def _order(axes: tuple[str | None, ...]) -> tuple[list[int], int]:
    """(axes of a leaf in the order M, D, X; how many of them are M)."""
    matrices = [i for i, name in enumerate(axes) if name in (None, "layers")]
    others = [i for i, name in enumerate(axes) if name not in (None, "layers", "embed")]
    return [*matrices, axes.index("embed"), *others], len(matrices)


def _to_stack(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    order, count = _order(axes)
    x = x.transpose(order)
    return x.reshape(math.prod(x.shape[:count]), x.shape[count], -1)


def _from_stack(x_MDX: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    order, _ = _order(axes)
    back = sorted(range(len(order)), key=order.__getitem__)
    return x_MDX.reshape([shape[i] for i in order]).transpose(back)


def _on_whole(x_MDX: jax.Array) -> jax.Array:
    """Orthogonalise a stack whose D is split over `fsdp` and X over `tensor`."""
    matrices, shards = x_MDX.shape[0], math.prod(axis_size(axis) for axis in _SHARDS)
    each = -(-matrices // shards)  # of one device and its replicas together
    x_PMDX = jnp.pad(x_MDX, ((0, each * shards - matrices), (0, 0), (0, 0))).reshape(shards, each, *x_MDX.shape[1:])
    return _by_replicas(x_PMDX).reshape(each * shards, *x_MDX.shape[1:])[:matrices]


def _by_replicas(x_PMDX: jax.Array) -> jax.Array:
    """Orthogonalise every place's matrices, each by one of the devices that hold the same parts."""
    replicas, each = math.prod(axis_size(axis) for axis in _REPLICAS), x_PMDX.shape[1]
    if replicas == 1:
        return _split(_newton_schulz(_gather(x_PMDX)))
    mine = -(-each // replicas)
    wanted = jax.lax.axis_index(_REPLICAS) * mine
    start = jnp.minimum(wanted, each - mine)
    y_PMDX = _split(_newton_schulz(_gather(jax.lax.dynamic_slice_in_dim(x_PMDX, start, mine, axis=1))))
    is_mine_M = start + jnp.arange(mine) >= wanted  # the last ones may have had to start earlier, or have none
    y_PMDX = jnp.where(is_mine_M[None, :, None, None], y_PMDX, 0)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(x_PMDX), y_PMDX, start, axis=1), _REPLICAS)


def _gather(x_PMDX: jax.Array) -> jax.Array:
    """Exchange parts of all places' matrices for this place's whole ones, [P, M, d, x] -> [M, D, X]."""
    fsdp, tensor = (axis_size(axis) for axis in _SHARDS)
    x = x_PMDX.reshape(fsdp, tensor, *x_PMDX.shape[1:])
    if fsdp > 1:
        x = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=3, tiled=True)
    if tensor > 1:
        x = jax.lax.all_to_all(x, "tensor", split_axis=1, concat_axis=4, tiled=True)
    return x.reshape(x.shape[2:])


def _split(y_MDX: jax.Array) -> jax.Array:
    """The way back of ``_gather``."""
    fsdp, tensor = (axis_size(axis) for axis in _SHARDS)
    y = y_MDX[None, None]
    if tensor > 1:
        y = jax.lax.all_to_all(y, "tensor", split_axis=4, concat_axis=1, tiled=True)
    if fsdp > 1:
        y = jax.lax.all_to_all(y, "fsdp", split_axis=3, concat_axis=0, tiled=True)
    return y.reshape(fsdp * tensor, *y.shape[2:])


def _newton_schulz(x_MDX: jax.Array) -> jax.Array:
    """Orthogonalise whole matrices, few at a time."""
    # optax' momentum switched off: its input here is whole, and the momentum is not
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )

    def few(x_MDX: jax.Array) -> jax.Array:
        return muon.update(x_MDX, muon.init(x_MDX))[0]  # pyright: ignore[reportReturnType]

    count, *sizes = x_MDX.shape
    together = max(k for k in range(1, _TOGETHER + 1) if count % k == 0)
    y = jax.lax.map(few, x_MDX.reshape(-1, together, *sizes)) if count > together else few(x_MDX)
    return RMS * math.sqrt(max(sizes)) * y.reshape(x_MDX.shape)

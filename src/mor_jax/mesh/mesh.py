"""Device mesh, and the shardings of parameters, optimiser state and batch.

Rows are split over `slice`, `data` and `fsdp`, their tokens over `context`; parameters and optimiser state over `fsdp`
(width) and `tensor` (heads, feed-forward, vocabulary). Routing never leaves its row, so it stays local to a batch
shard. The table of logical axes is ``axes.LOGICAL_RULES``.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mor_jax.config import Config, MeshConfig, ModelConfig
from mor_jax.errors import require
from mor_jax.mesh.axes import BATCH_AXES, partition_spec
from mor_jax.mesh.devices import Device

MESH_AXES = ("slice", "data", "fsdp", "context", "tensor")
"""Outermost first: the axes that talk most come last, on the nearest neighbours."""


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Arrange the devices as (slice, data, fsdp, context, tensor), all axes Auto.

    Devices of several slices, which are joined by the data-center network, are arranged so that only `slice` crosses
    it. Devices that know no slice (GPU, CPU) are taken in their order.

    Args:
        config: sizes; data = -1 takes what the others leave.
        devices: devices to use; None takes all.

    Raises:
        UserError: the sizes do not multiply to the devices, or `slice` is not the number of slices they lie in.
    """
    devices = jax.devices() if devices is None else devices
    shape = _mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return Mesh(_arrange(shape, None, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    require(
        config.slice == slices,
        f"mesh.slice={config.slice}, but the devices lie in {slices} slices (set mesh.slice={slices})",
    )
    one_slice, across = (1, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
    return Mesh(_arrange(one_slice, across, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(shape: tuple[int, ...], across: tuple[int, ...] | None, devices: Sequence[Device]) -> np.ndarray:
    """Lay a mesh's axes along the chips' network; an axis that fits no side, such as 8 on 4x4x4, takes part of one."""

    def create(split: bool) -> np.ndarray:
        if across is None:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(shape, across, devices, allow_split_physical_axes=split)

    try:
        return create(split=False)
    except NotImplementedError:  # jax's word for an axis that is no product of sides
        return create(split=True)


def _mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    product = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    require(count % others == 0, f"{product}: {others} does not divide the {count} devices")
    if config.data == -1:
        sizes["data"] = count // others
    require(math.prod(sizes.values()) == count, f"{product} does not multiply to the {count} devices")
    return tuple(sizes.values())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuse a mesh whose axes do not divide the batch or the model.

    Raises:
        UserError: names the field, its value and the mesh axis that does not divide it.
    """
    train = config.train
    shards = batch_shards(mesh)
    rows = train.batch_size // train.accumulation
    require(
        rows % shards == 0,
        f"train.batch_size={train.batch_size} / train.accumulation={train.accumulation} = {rows} rows per micro-batch "
        f"is not divisible by mesh slice x data x fsdp = {shards}",
    )
    check_model(config.model, mesh)


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh whose axes do not divide the model.

    Raises:
        UserError: names the field, its value and the mesh axis that does not divide it.
    """
    for name, axis in (
        ("num_heads", "tensor"),
        ("num_kv_heads", "tensor"),
        ("d_ff", "tensor"),
        ("vocab_size", "tensor"),
        ("d_model", "fsdp"),
        ("context_length", "context"),
    ):
        value, size = getattr(model, name), mesh.shape[axis]
        require(value % size == 0, f"model.{name}={value} is not divisible by mesh.{axis}={size}")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within this context the mesh is the ambient one; None leaves things as they are."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of small values that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Return a tree of ``NamedSharding`` for a tree of tuples of logical axis names."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)), logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def state_shardings(mesh: Mesh, state: Any, logical_axes: Any) -> Any:
    """Shard a train state: every leaf that mirrors a parameter (moments too) like the parameter, the rest replicated.

    A leaf mirrors the parameter whose path its own path ends with, as the moments of optax do.

    Args:
        mesh: from ``make_mesh``.
        state: any tree of arrays or ``jax.ShapeDtypeStruct`` that holds parameters and optimiser state.
        logical_axes: the parameters' tree of tuples of logical axis names.
    """
    by_path = {
        _dict_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(params_shardings(mesh, logical_axes))
    }
    everywhere = replicated(mesh)

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        keys = _dict_keys(path)
        suffixes = (keys[start:] for start in range(len(keys)))
        return next((by_path[suffix] for suffix in suffixes if suffix in by_path), everywhere)

    return jax.tree.map_with_path(sharding, state)


def _dict_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Return the rows of a global batch that this process's devices hold, ascending.

    On a pod they need not be one block: the mesh follows the chips' places, not the hosts' numbers. Hosts that share
    the model between them (`tensor`) hold the same rows.

    Args:
        mesh: from ``make_mesh``.
        batch_size: rows of the global batch.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch_size))})


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int | None = None) -> dict[str, jax.Array]:
    """Put this process's rows on its devices as a part of the global batch.

    Args:
        mesh: from ``make_mesh``.
        batch: arrays [rows of this process, ...], the rows that ``local_rows`` names.
        batch_size: rows of the global batch; None takes the given ones for all.

    Returns:
        Global arrays [batch_size, ...], split over `slice`, `data` and `fsdp`; rows are whole along `context`, so that
        the shift from inputs to targets crosses no border.
    """
    sharding = batch_sharding(mesh)
    size = len(next(iter(batch.values()))) if batch_size is None else batch_size
    rows = local_rows(mesh, size)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = rows.index(start)
            return array[first : first + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}

"""Logical axis names of arrays, the mesh axes that split them, and the constraint that holds an activation in place.

The model names the axes of its arrays; only the table below knows the mesh. Without an ambient mesh (`jax.set_mesh`)
every function here leaves its argument alone, so the same model runs on one device.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")
"""Mesh axes that split the rows of a batch."""

LOGICAL_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "sequence": "context",
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "layers": None,
    "recursions": None,
}
"""Mesh axes of every logical axis. `embed` is the width of parameters; activations keep theirs whole."""


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Translate logical axis names to mesh axes."""
    return PartitionSpec(*(None if name is None else LOGICAL_RULES[name] for name in logical_axes))


def current_mesh() -> AbstractMesh | None:
    """Return the ambient mesh; None without one, when it is a single device, or when it is not of our axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Within this context there is no ambient mesh: for tracing shapes that no mesh divides."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def axis_size(mesh_axis: str) -> int:
    """Size of a mesh axis of the ambient mesh, 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[mesh_axis]


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Hold an activation to the sharding of its logical axes; the partitioner chooses the rest.

    Args:
        x: any array under `jit`.
        logical_axes: a name of ``LOGICAL_RULES`` or None (whole on every device) per axis.
    """
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def whole_width(weight: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Gather a parameter's width, which `fsdp` splits, here and not at every use; its gradient stays split.

    Args:
        weight: a parameter, or its copy in the compute dtype.
        logical_axes: the parameter's, names of ``LOGICAL_RULES``.
    """

    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        return constrain(weight, *(None if name == "embed" else name for name in logical_axes))

    gather.defvjp(lambda weight: (gather(weight), None), lambda _, grad: (constrain(grad, *logical_axes),))
    return gather(weight)


def on_shards(local: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """Run a function on every device's share of its arguments; without a mesh, on the whole.

    Args:
        local: may name mesh axes in collectives; sees shares, and returns shares.
        in_axes: per argument a tuple of logical axis names, or a tree of them.
        out_axes: the same for what it returns; axes left out are equal on every device.
    """
    if current_mesh() is None:
        return local
    is_axes = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
    in_specs, out_specs = (jax.tree.map(partition_spec, axes, is_leaf=is_axes) for axes in (in_axes, out_axes))
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)

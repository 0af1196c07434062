"""The mesh: refusals, slices, shardings, and training on 8 devices as on one."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mor_jax.config import Config, MeshConfig
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import check_mesh, make_mesh, shard_batch
from mor_jax.runs.state import abstract_train_state, init_train_state
from mor_jax.train.step import compile_train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from tiny_runs import make_batch, tiny_config  # pyright: ignore[reportMissingImports]


def test_the_rest_goes_to_data_and_axes_are_auto():
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices())
    assert dict(mesh.shape) == {"slice": 1, "data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"mesh.slice=1 x mesh.data=3 x mesh.fsdp=1 x mesh.context=1 x mesh.tensor=1 does not mul"),
        (MeshConfig(fsdp=3), r"3 does not divide the 8 devices"),
        (MeshConfig(slice=2, context=8), r"16 does not divide the 8 devices"),
    ],
)
def test_sizes_that_do_not_multiply_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, jax.devices())


@pytest.mark.parametrize(
    ("mesh", "train", "message"),
    [
        (MeshConfig(tensor=8), {}, "model.num_heads=4 is not divisible by mesh.tensor=8"),
        (MeshConfig(tensor=4), {}, "model.num_kv_heads=2 is not divisible by mesh.tensor=4"),
        (MeshConfig(), {"batch_size": 12}, "12 rows per micro-batch is not divisible by mesh slice x data x fsdp = 8"),
        (MeshConfig(), {"accumulation": 2}, "= 4 rows per micro-batch is not divisible"),
        (MeshConfig(slice=2, fsdp=2), {"batch_size": 12}, "12 rows .* by mesh slice x data x fsdp = 8"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_or_batch_is_refused(mesh, train, message):
    config = dataclasses.replace(tiny_config(**train), mesh=mesh)
    with pytest.raises(UserError, match=message):
        check_mesh(config, make_mesh(mesh, jax.devices()))


def test_context_must_divide_the_row():
    config = tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, context_length=30))
    with pytest.raises(UserError, match=r"model.context_length=30 is not divisible by mesh.context=4"):
        check_mesh(config, make_mesh(MeshConfig(context=4), jax.devices()))


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What ``mesh_utils`` asks of a device."""

    id: int
    slice_index: int
    platform: str = "gpu"  # a TPU's would be arranged by its coordinates
    device_kind: str = "chip"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class _TpuChip:
    """A chip at a place of its slice's network."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("fsdp", [2, 8, 32])
def test_an_axis_that_is_no_side_of_the_network_takes_part_of_one(fsdp, slices):
    """No sides of 4x4x4 multiply to 2, 8 or 32; the chips of a group still form a box of that many."""
    places = list(itertools.product(range(slices), range(4), range(4), range(4)))
    chips = [_TpuChip(id=n, coords=(x, y, z), slice_index=s) for n, (s, z, y, x) in enumerate(places)]
    mesh = make_mesh(MeshConfig(slice=slices, fsdp=fsdp), chips)
    assert dict(mesh.shape) == {"slice": slices, "data": 64 // fsdp, "fsdp": fsdp, "context": 1, "tensor": 1}
    for group in mesh.devices.reshape(-1, fsdp):
        sides = [len({chip.coords[axis] for chip in group}) for axis in range(3)]
        assert math.prod(sides) == fsdp
        assert len({chip.slice_index for chip in group}) == 1


def test_only_the_axis_slice_crosses_slices():
    chips = [_Chip(id=number, slice_index=number % 2) for number in range(8)]  # in no order of slices
    mesh = make_mesh(MeshConfig(slice=2, fsdp=2, context=2), chips)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    for number in range(2):
        assert {chip.slice_index for chip in mesh.devices[number].flat} == {number}
    with pytest.raises(UserError, match=r"mesh.slice=1, but the devices lie in 2 slices \(set mesh.slice=2\)"):
        make_mesh(MeshConfig(fsdp=8), chips)


def test_moments_are_sharded_like_their_parameters_and_counters_replicated():
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    state = abstract_train_state(config, make_mesh(config.mesh, jax.devices()))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    for name in ("ffn/down", "attention/query"):
        found = {spec for path, spec in specs.items() if path.endswith(name)}
        assert len(found) == 1
        assert sum(path.endswith(name) for path in specs) == 3  # parameter and two moments
    assert specs["params/block/ffn/down"] == PartitionSpec(None, "tensor", "fsdp")
    assert {spec for path, spec in specs.items() if path.endswith("count")} == {PartitionSpec()}
    assert specs["router_bias_R"] == PartitionSpec()


def _train(config: Config, devices: int) -> tuple[list[dict[str, Any]], Any]:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    state, executable, metrics = init_train_state(config, mesh), compile_train_step(config, mesh), []
    for step in range(3):
        state, values = executable(state, shard_batch(mesh, make_batch(config, step)))
        metrics.append(jax.device_get(values))
    return metrics, jax.device_get(state.opt_state)


def test_eight_devices_train_like_one():
    """Optimiser and accumulation; tests/parallel compares gradients for every axis, router and strategy."""
    config = tiny_config(accumulation=2)
    one, one_moments = _train(dataclasses.replace(config, mesh=MeshConfig()), 1)
    eight, eight_moments = _train(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), 8)
    for a, b in zip(one, eight, strict=True):
        for name in ("loss", "total_loss", "grad_norm", "tokens_per_depth"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # Adam's moments are running means of the gradients
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one_moments, eight_moments)

"""Loss and gradients of every mesh equal those of one device, float32, to 1e-5."""

import dataclasses
import functools
from typing import Any

import pytest
from sharded_programs import assert_equal, config_of, loss_and_gradients

from mor_jax.config import MeshConfig, PartsConfig, RecursionConfig

ALONE = {
    "slice": MeshConfig(slice=8, data=1),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "context": MeshConfig(data=1, context=8),  # capacities that 8 does not divide: empty slots
    "tensor": MeshConfig(data=1, tensor=2),
}
TOGETHER = {
    "fsdp x tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "data x context": MeshConfig(data=2, context=4),
    "all": MeshConfig(slice=2, data=1, fsdp=2, context=2),
}
MESHES = ALONE | TOGETHER
CASES = [
    (router, kv_strategy, execution)
    for router in ("expert", "token")
    for kv_strategy in ("recursion", "shared", "shared_update")
    for execution in ("gather", "scan")
]


@functools.cache
def one_device(case: tuple[str, str, str]) -> Any:
    return loss_and_gradients(config_of(*case, recursions=3), MeshConfig(data=1))


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        (("expert", "recursion", "gather"), "all"),
        (("expert", "shared", "gather"), "data x context"),
        (("token", "shared_update", "gather"), "fsdp x tensor"),
    ],
)
def test_a_mesh_equals_one_device(case, mesh):
    assert_equal(one_device(case), loss_and_gradients(config_of(*case, recursions=3), MESHES[mesh]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_mesh_equals_one_device(case, mesh):
    assert_equal(one_device(case), loss_and_gradients(config_of(*case, recursions=3), MESHES[mesh]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp x tensor", "all"])
@pytest.mark.parametrize("router", ["none", "expert"])
def test_parts_on_a_mesh_equal_one_device(router, mesh):
    """Beside the kernels where rows are whole: norms of heads come before the rotation, which is then XLA's."""
    config, parts = config_of(router), PartsConfig(qk_norm=True, value_residual=router == "none")
    recursion = config.model.recursion if router == "expert" else RecursionConfig()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, recursion=recursion, parts=parts))
    fused = dataclasses.replace(config.perf, fusion="triton" if MESHES[mesh].context == 1 else "xla")
    one = loss_and_gradients(config, MeshConfig(data=1))
    assert_equal(one, loss_and_gradients(dataclasses.replace(config, perf=fused), MESHES[mesh]))


@pytest.mark.parametrize("tensor", [1, 2])
def test_fused_kernels_work_on_their_shards(tensor):
    """The GPU kernels (interpreted here) under rows, width and feed-forward split three ways; heads joined or split."""
    config = config_of("expert")
    fused = dataclasses.replace(config, perf=dataclasses.replace(config.perf, fusion="triton"))
    one = loss_and_gradients(config, MeshConfig(data=1))
    assert_equal(one, loss_and_gradients(fused, MeshConfig(data=2, fsdp=2, tensor=tensor)))

"""What is known of chips by their names, and what is asked of the device itself."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mor_jax.mesh import devices
from mor_jax.mesh.devices import CHIPS, GIB, chip_of, interpret_kernels, is_hopper, memory_bytes, peak_flops


def _device(kind, stats=None):
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("kind", "name", "teraflops", "gib"),
    [
        ("TPU v4", "v4", 275, 32),
        ("TPU v5 lite", "v5e", 197, 16),
        ("TPU v5e", "v5e", 197, 16),
        ("TPU v5", "v5p", 459, 95),
        ("TPU v5p", "v5p", 459, 95),
        ("TPU v6 lite", "v6e", 918, 32),
        ("TPU v6e", "v6e", 918, 32),
        ("TPU7x", "tpu7x", 1153.5, 96),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 312, 80),
        ("NVIDIA H100 80GB HBM3", "H100", 989, 80),
        ("NVIDIA H200", "H200", 989, 141),
    ],
)
def test_chips_by_what_jax_calls_them(kind, name, teraflops, gib):
    chip, device = chip_of(_device(kind)), _device(kind)
    assert chip is CHIPS[name] and peak_flops(device) == teraflops * 1e12
    assert memory_bytes(device) == gib * GIB
    assert memory_bytes(_device(kind, {"bytes_limit": 5})) == 5  # what the device says counts more


def test_nothing_is_known_of_a_cpu():
    cpu = jax.devices("cpu")[0]
    assert chip_of(cpu) is None and peak_flops(cpu) is None
    assert memory_bytes(_device("cpu")) is None


def test_a_cycle_of_the_v5e_is_131072_operations():
    chip = CHIPS["v5e"]
    assert chip.clock_hz is not None and chip.flops / chip.clock_hz == pytest.approx(131_072, rel=0.01)


def test_programs_are_traced_for_the_described_device():
    assert devices.target_platform() == devices.process_platform() == jax.default_backend()
    for platform in ("gpu", "tpu"):
        described = AbstractMesh((), (), abstract_device=AbstractDevice("a chip", 1, platform))
        with jax.sharding.use_abstract_mesh(described):
            assert devices.target_platform() == platform


@pytest.mark.parametrize(
    ("platform", "capability", "hopper"),
    [("gpu", "9.0", True), ("gpu", "10.0", False), ("gpu", "8.0", False), ("tpu", "9.0", False)],
)
def test_hopper_is_compute_capability_nine(platform, capability, hopper, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert is_hopper() == hopper and not interpret_kernels()

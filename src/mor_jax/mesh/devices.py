"""What a device is and can do: the one place that knows platforms, chips, their peaks, memory and clock.

References:
    Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" (key chip specifications,
    November 2026); NVIDIA's data sheets of A100, H100 SXM and H200 SXM.
"""

from dataclasses import dataclass
from typing import Any

import jax

Device = Any
"""A ``jax.Device``, real or only described, which type checkers do not take for a type."""
GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """What one device (as JAX counts: a chip, or on TPU7x half of one) can do, as its maker states it.

    Rates are peaks that no program reaches; None is not known here.
    """

    name: str
    kinds: tuple[str, ...]
    """What ``jax.Device.device_kind`` calls it."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: int
    """Memory."""
    hbm_rate: float
    """Bytes/s between memory and core."""
    program_bytes: float | None = None
    """Memory that the TPU compiler gives to programs."""
    clock_hz: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9),
        # a TPU's clock: FLOP/s over FLOP a cycle, 131,072 on v5e, 262,144 on v5p, 524,288 on v6e and half a TPU7x
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 15.75 * GIB, clock_hz=1.5e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 95 * GIB, clock_hz=1.75e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 31.25 * GIB, clock_hz=1.75e9),
        Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 96 * GIB, 7380e9 / 2, 94.75 * GIB, clock_hz=2.2e9),  # half a chip
        Chip("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * GIB, 1555e9),
        Chip("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2039e9),
        Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9),
        Chip("H200", ("NVIDIA H200",), 989e12, 141 * GIB, 4800e9),
    )
}
"""By name; a CPU is none of them."""
_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
_H100_MULTIPROCESSORS = 132


def chip_of(device: Device) -> Chip | None:
    """Look up a device; None for a CPU and for chips that are not in ``CHIPS``."""
    return _BY_KIND.get(device.device_kind)


def peak_flops(device: Device) -> float | None:
    """Dense bfloat16 FLOP/s that utilisation is measured against; None if not known."""
    chip = chip_of(device)
    return None if chip is None else chip.flops


def memory_bytes(device: Device) -> int | None:
    """Memory that programs may use on a device: what it says, else what its maker states; None if neither is known."""
    stats: Any = None
    try:
        stats = device.memory_stats()
    except (AttributeError, NotImplementedError, RuntimeError):  # described devices have none
        stats = None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    chip = chip_of(device)
    return None if chip is None else chip.hbm_bytes


def process_platform() -> str:
    """Platform of this process's devices: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


def target_platform() -> str:
    """Platform that the traced program is for: the ambient mesh's, which may only be described, or this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return process_platform() if device is None else device.platform


def compute_capability() -> str:
    """Compute capability of this process's GPU, such as `9.0`; empty where there is none."""
    return str(getattr(jax.devices()[0], "compute_capability", "")) if process_platform() == "gpu" else ""


def is_hopper() -> bool:
    """Whether this process's device is a Hopper GPU."""
    return compute_capability().startswith("9.")


def multiprocessors() -> int:
    """Multiprocessors of this process's GPU; of an H100 where there is none."""
    return getattr(jax.devices()[0], "core_count", None) or _H100_MULTIPROCESSORS


def interpret_kernels() -> bool:
    """Whether Pallas' interpreter has to stand in for a compiler of kernels: this process has CPUs only."""
    return process_platform() == "cpu"

"""TPU slices that exist only by name: their chips, the networks between them, and devices to compile for.

`libtpu` compiles for any slice on any host, so none of this needs a TPU.

References:
    Cloud TPU documentation, pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" (key chip specifications, November 2026).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from mor_jax.errors import UserError, require, suggest
from mor_jax.mesh.devices import CHIPS, Chip, Device

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server which TPU this host has
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a killed compiler leaves its lock behind
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # both unset, libtpu looks for them and warns at length
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Generation:
    """The devices of a TPU generation's slices and what joins them, as Google states it.

    Rates are peaks that no program reaches; they serve as bounds.
    """

    chip: Chip
    """One device."""
    devices_per_chip: int
    ici_rate: float
    """Bytes/s that a device receives over all links of its slice: half of the stated bidirectional rate."""
    dcn_rate: float
    """Bytes/s that a device receives from other slices: the host's network divided by its devices."""
    hosts_of: int
    """Chips per host of a slice with several hosts."""
    sizes: tuple[str, ...]
    """Topologies on offer that a plan suggests; the compiler accepts more."""
    accelerator: str
    """Prefix of the accelerator types that are asked for in the cloud, such as `v5litepod-64`."""

    @property
    def name(self) -> str:
        """As topologies begin."""
        return self.chip.name

    @property
    def program_bytes(self) -> float:
        """Memory of a device that the compiler gives to programs."""
        assert self.chip.program_bytes is not None
        return self.chip.program_bytes


GENERATIONS = {
    g.name: g
    for g in (
        Generation(
            chip=CHIPS["v5e"],
            devices_per_chip=1,
            ici_rate=200e9,  # 400 GB/s bidirectional over 4 ports
            dcn_rate=3.125e9,  # 6.4 Tbit/s for a pod of 256
            hosts_of=4,
            sizes=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            accelerator="v5litepod-",
        ),
        Generation(
            chip=CHIPS["v5p"],
            devices_per_chip=1,
            ici_rate=600e9,  # 1200 GB/s bidirectional over 6 ports
            dcn_rate=6.25e9,  # 50 Gbit/s per chip
            hosts_of=4,
            sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
            accelerator="v5p-",
        ),
        Generation(
            chip=CHIPS["v6e"],
            devices_per_chip=1,
            ici_rate=400e9,  # 800 GB/s bidirectional over 4 ports
            dcn_rate=12.5e9,  # 25.6 Tbit/s for a pod of 256
            hosts_of=4,
            sizes=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            accelerator="v6e-",
        ),
        Generation(
            chip=CHIPS["tpu7x"],  # a chip is two devices; all rates here are halves of the chip's
            devices_per_chip=2,
            ici_rate=600e9 / 2,  # 1200 GB/s bidirectional
            dcn_rate=12.5e9 / 2,  # 100 Gbit/s per chip
            hosts_of=4,
            sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
            accelerator="tpu7x-",
        ),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
_FORM = re.compile(r"([a-z0-9]+):(\d+)x(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Topology:
    """One or several equal slices."""

    name: str
    """As the compiler takes it, such as `v5e:8x8`."""
    slices: int
    generation: Generation
    devices: tuple[Device, ...]
    """Devices that programs can be compiled for, not run on."""

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return len(self.devices) // self.generation.devices_per_chip

    @property
    def label(self) -> str:
        """The name, and how many slices if several."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def known_topologies() -> list[str]:
    """Return the names of the slices on offer."""
    return [f"{g.name}:{size}" for g in GENERATIONS.values() for size in g.sizes]


def describe_topology(name: str, slices: int = 1) -> Topology:
    """Look up a slice and describe its devices to JAX.

    Args:
        name: generation and shape in chips, such as `v5e:8x8` or `v5p:4x4x4`.
        slices: how many of them, joined by the data-center network.

    Raises:
        UserError: the name is not understood (the nearest is suggested), the compiler does not accept it, or the TPU
            compiler is not installed.
    """
    form = _FORM.fullmatch(name)
    generation = GENERATIONS.get(form[1]) if form else None
    if form is None or generation is None:
        raise UserError(f"topology={name!r} is not a TPU slice{_nearest(name)}; known: {', '.join(known_topologies())}")
    require(slices > 0, f"slices={slices} must be positive")
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    return Topology(name, slices, generation, tuple(_devices(name, slices, generation)))


def _nearest(name: str) -> str:
    """Suggest a known topology: by the number of chips where the name ends with one, else by spelling."""
    family, _, size = name.lower().replace("-", ":").partition(":")
    generation = GENERATIONS.get(_ALIASES.get(family, family))
    if generation is not None and size.isdigit():
        chips = int(size) // (2 if generation.name == "v5p" else 1)  # v5p-N counts cores
        nearest = min(generation.sizes, key=lambda shape: abs(_chips(shape) - chips))
        return f"; did you mean {generation.name + ':' + nearest!r}?"
    name = name if generation is None else f"{generation.name}:{size}"
    return suggest(name, known_topologies())


def _chips(shape: str) -> int:
    count = 1
    for side in shape.split("x"):
        count *= int(side)
    return count


def _devices(name: str, slices: int, generation: Generation) -> Sequence[Device]:
    from jax.experimental import topologies  # brings in the TPU plugin

    options: dict[str, object] = {} if slices == 1 else {"num_slices": slices}
    if _chips(name.partition(":")[2]) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        offered = ", ".join(f"{generation.name}:{size}" for size in generation.sizes)
        hint = "the TPU compiler is missing: pip install -e '.[tpu]'" if _is_missing() else f"on offer: {offered}"
        raise UserError(f"topology={name!r}: {reason} ({hint})") from error


def _is_missing() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is None

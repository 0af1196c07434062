"""The planned cases: which preset on which slices, with which flags; the most telling first."""

from dataclasses import dataclass

TOPOLOGIES = (("v5e:8x8", 1), ("v5e:8x8", 2), ("v6e:8x8", 1), ("v5p:4x4x4", 1), ("v5e:16x16", 1))
"""(slice, how many of it)."""
PAIRS = {"360m": ("mor-360m-expert-r3", "vanilla-360m"), "1.7b": ("mor-1.7b-expert-r3", "vanilla-1.7b")}
"""Model sizes: MoR with three recursions and its vanilla counterpart."""
FSDP = {"360m": 8, "1.7b": 16}
"""Shards of parameters and optimiser state; the rest of a slice is data parallel."""


@dataclass(frozen=True)
class Case:
    """One compilation."""

    preset: str
    topology: str
    slices: int
    fsdp: int
    execution: str = "gather"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """Name of the result file."""
        slices = "" if self.slices == 1 else f"_x{self.slices}"
        execution = "" if self.execution == "gather" else f"_{self.execution}"
        optimizer = "" if self.optimizer == "adamw" else f"_{self.optimizer}"
        return f"{self.preset}_{self.topology.replace(':', '-')}{slices}{execution}{optimizer}"

    @property
    def arguments(self) -> list[str]:
        """What follows `mor plan`: the preset's batch of 1024 rows, layers rematerialised whole."""
        flags = {
            "topology": self.topology,
            "slices": self.slices,
            "mesh.slice": self.slices,
            "mesh.fsdp": self.fsdp,
            "perf.remat": "full",
            "perf.execution": self.execution,
            "optimizer.kind": self.optimizer,
        }
        return [self.preset, *(text for name, value in flags.items() for text in (f"--{name}", str(value))), "--json"]


MUON = Case(PAIRS["360m"][0], *TOPOLOGIES[0], FSDP["360m"], optimizer="muon")


def cases() -> list[Case]:
    """List all cases: a pair on every topology, then the small MoR under `scan`, then the pairs of the larger size;
    last the small MoR with Muon."""
    found = []
    for size, presets in PAIRS.items():
        found += [Case(preset, *where, FSDP[size]) for where in TOPOLOGIES for preset in presets]
        if size == "360m":
            found += [Case(presets[0], *where, FSDP[size], "scan") for where in TOPOLOGIES]
    return [*found, MUON]

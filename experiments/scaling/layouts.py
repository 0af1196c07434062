"""What is timed: models, layouts and numbers of cards, what rules leave out, how long each takes, and the order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractMesh

from mor_jax.bench.cases import parse_case
from mor_jax.bench.run import Settings, measured_config
from mor_jax.config import Config, MeshConfig
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import MESH_AXES, check_model

FAMILIES = ("vanilla", "mor")


@dataclass(frozen=True)
class Size:
    """A model in both families, and what is asked of it."""

    presets: tuple[str, str]
    """Of vanilla and MoR with three recursions, as `mor bench train` reads them."""
    rows: int
    """Rows per card."""
    long_rows: int
    """Rows per card of ``long_tokens``: as many tokens as ``rows`` have."""
    long_tokens: int
    """Tokens of a row that `context` splits."""
    wanted: float
    """Efficiency that is asked for."""
    compile_seconds: tuple[float, float]
    """Of vanilla and MoR, as seen on one and two H200s (experiments/throughput/results), rounded up."""


_DEBUG = "debug:model.num_layers=5,model.recursion.num_recursions="
SIZES = {
    "360m": Size(("vanilla-360m", "mor-360m-expert-r3"), 16, 4, 8192, 0.92, (16.0, 32.0)),
    "1.7b": Size(("vanilla-1.7b", "mor-1.7b-expert-r3"), 4, 1, 8192, 0.95, (18.0, 34.0)),
    "debug": Size(
        (f"{_DEBUG}1,model.recursion.sharing=none,model.routing.kind=none", f"{_DEBUG}3"), 2, 1, 256, 0.92, (20.0, 30.0)
    ),
}
LAYOUTS = ("data", "fsdp", "fsdp-tensor2", "context2", "slice2-fsdp")
_FIXED = {"fsdp-tensor2": 2, "context2": 2, "slice2-fsdp": 2}
"""Cards that a layout's fixed axis takes; `fsdp` or `data` has the rest."""
_START_SECONDS, _PROCESSES_SECONDS, _STEPS_SECONDS = 15.0, 10.0, 10.0


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    size: str
    family: str
    layout: str
    cards: int
    per_card: bool = False
    """One process per card instead of one for all."""
    long: bool = False
    """Rows of ``long_tokens``."""

    @property
    def name(self) -> str:
        """Of the case's file."""
        if self.cards == 1:
            return f"{self.size}-{self.family}-one{'-long' if self.long else ''}"
        return f"{self.size}-{self.family}-{self.layout}-{self.cards}{'-processes' if self.per_card else ''}"

    @property
    def processes(self) -> int:
        """Processes that the case runs in."""
        return self.cards if self.per_card else 1

    @property
    def one_card(self) -> "Case":
        """The same model and row length on one card, which efficiency is measured against."""
        return replace(self, layout="data", cards=1, per_card=False)

    def config(self) -> Config:
        """The configuration with one card's rows as its batch."""
        size = SIZES[self.size]
        longer = (f"model.context_length={size.long_tokens}",) if self.long else ()
        config = parse_case(size.presets[FAMILIES.index(self.family)], longer).config
        config = measured_config(config, Settings(rows=size.long_rows if self.long else size.rows))
        return replace(config, mesh=mesh_of(self.layout, self.cards))

    def stated_seconds(self) -> float:
        """How long the case should take from start to end; several cards are profiled, which compiles once more."""
        compiling = SIZES[self.size].compile_seconds[FAMILIES.index(self.family)]
        joining = _PROCESSES_SECONDS if self.per_card else 0.0
        return _START_SECONDS + joining + _STEPS_SECONDS + compiling * (2 if self.cards > 1 else 1)


def mesh_of(layout: str, cards: int) -> MeshConfig:
    """Sizes of the mesh axes; `data` takes what is left where `fsdp` is not named."""
    rest = cards // _FIXED.get(layout, 1)
    return {
        "data": MeshConfig(),
        "fsdp": MeshConfig(fsdp=rest),
        "fsdp-tensor2": MeshConfig(fsdp=rest, tensor=2),
        "context2": MeshConfig(context=2),
        "slice2-fsdp": MeshConfig(slice=2, fsdp=rest),
    }[layout]


def why_not(case: Case) -> str | None:
    """Say which rule leaves a case out; None if it can be timed."""
    fixed = _FIXED.get(case.layout, 1)
    if case.cards % fixed:
        return f"{case.cards} cards are not a multiple of {fixed}"
    if case.layout == "slice2-fsdp" and case.cards == fixed:
        return f"on {case.cards} cards it is data"
    config = case.config()
    sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in MESH_AXES}
    mesh: Any = AbstractMesh(tuple(sizes.values()), MESH_AXES)  # no devices are asked for
    try:
        check_model(config.model, mesh)
    except UserError as error:
        return str(error)
    return None


def all_cases(sizes: Sequence[str], cards: int) -> list[Case]:
    """Every case of several cards, whether it can be timed or not, the most telling first.

    That is: the largest number of cards before smaller ones; `data` and `fsdp` before the other layouts; one process
    for all before one per card; the sizes in the order given; vanilla and MoR of a layout side by side.

    Args:
        sizes: of ``SIZES``.
        cards: the largest number of cards; with it go 2, 4 and 8 where they are fewer.
    """
    counts = [count for count in (2, 4, 8) if count < cards] + [cards] * (cards > 1)
    cases = [
        Case(size, family, layout, count, per_card, long=layout == "context2")
        for count in counts
        for per_card in (False, True)
        for layout in LAYOUTS
        for size in sizes
        for family in FAMILIES
    ]

    def place(case: Case) -> tuple[Any, ...]:
        main = case.layout in ("data", "fsdp")
        within = (sizes.index(case.size), LAYOUTS.index(case.layout), FAMILIES.index(case.family))
        return (case.cards != cards, not main, case.per_card, -case.cards, *within)

    return sorted(cases, key=place)


def ranked(sizes: Sequence[str], cards: int) -> list[Case]:
    """The cases that can be timed, the most telling first, each model's one card before what is measured against it."""
    cases: list[Case] = []
    for case in all_cases(sizes, cards):
        if why_not(case) is None:
            cases += [case] if case.one_card in cases else [case.one_card, case]
    if cards == 1:
        cases = [
            Case(size, family, "data", 1, long=long) for long in (False, True) for size in sizes for family in FAMILIES
        ]
    return cases

"""Growing the number of passes during training: what is asked for, and the stretches of steps that follow from it."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from mor_jax.config.model import ModelConfig
from mor_jax.config.recursion import RoutingConfig
from mor_jax.errors import require


@dataclass(frozen=True)
class GrowthStage:
    """Part of a run that trains fewer passes than the model has, or leaves its router out."""

    share: float
    """Of the run's optimiser steps."""
    num_recursions: int
    """Passes through the shared block, 1..N_r."""
    routed: bool = False
    """Whether the router decides already; without it every token takes every pass."""

    def __str__(self) -> str:
        return f"{self.share:g}:{self.num_recursions}" + ":routed" * self.routed

    @staticmethod
    def parse(text: str) -> "GrowthStage":
        """Read ``SHARE:RECURSIONS`` or ``SHARE:RECURSIONS:routed``, as flags spell a stage.

        Raises:
            ValueError: it is neither.
        """
        share, passes, *routed = text.split(":")
        if routed not in ([], ["routed"]):
            raise ValueError(f"{text!r} is not SHARE:RECURSIONS[:routed]")
        return GrowthStage(float(share), int(passes), bool(routed))


GrowthFlag = Annotated[
    GrowthStage,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SHARE:RECURSIONS[:routed]",
        instance_from_str=lambda words: GrowthStage.parse(words[0]),
        is_instance=lambda value: isinstance(value, GrowthStage),
        str_from_instance=lambda stage: [str(stage)],
    ),
]
"""A stage as one word of the command line."""


@dataclass(frozen=True)
class Stage:
    """A stretch of a run's steps and the model that it trains; the last one is the configured model's."""

    start: int
    """0-based first step."""
    end: int
    """The step after its last."""
    model: ModelConfig
    routed_from: int
    """0-based step at which routing enters, from which its warm-ups count."""

    @property
    def description(self) -> str:
        """What it trains, in words."""
        passes = self.model.recursion.num_recursions
        routed = self.model.routing.kind != "none"
        return f"{passes} pass{'es' * (passes > 1)}, {'routed' if routed else 'without router'}"


def fewer_passes(model: ModelConfig, count: int) -> ModelConfig:
    """Return the model of the first ``count`` passes: the same block, and the routers, if any, of these passes.

    Args:
        model: one that repeats a whole block; not token-choice, whose one router scores all depths at once.
        count: passes, 1..N_r.
    """
    if count == model.recursion.num_recursions:
        return model
    recursion = dataclasses.replace(model.recursion, num_recursions=count, base_depth=model.block_depth)
    routing = model.routing
    if routing.kind == "expert":
        boundaries = routing.boundaries and routing.boundaries[:count]
        routing = dataclasses.replace(routing, capacities=model.capacities[:count], boundaries=boundaries)
    return dataclasses.replace(model, recursion=recursion, routing=routing)


def stage_models(model: ModelConfig, growth: Sequence[GrowthStage]) -> tuple[tuple[float, ModelConfig], ...]:
    """Return (share of the steps, model) of every stage: those of ``train.growth``, then the model itself.

    Raises:
        UserError: the model has no stages, or one falls back behind the one before it.
    """
    if growth:
        _check(model, growth)
    unrouted = dataclasses.replace(model, routing=RoutingConfig())
    grown = [(s.share, fewer_passes(model if s.routed else unrouted, s.num_recursions)) for s in growth]
    return (*grown, (1 - math.fsum(stage.share for stage in growth), model))


def plan_stages(model: ModelConfig, growth: Sequence[GrowthStage], steps: int) -> tuple[Stage, ...]:
    """Lay the stages of a run out over its steps; without growth there is one.

    Args:
        model: the configured one.
        growth: ``train.growth``.
        steps: ``train.steps``.

    Raises:
        UserError: what ``stage_models`` says, or a stage of less than a step.
    """
    shares, models = zip(*stage_models(model, growth), strict=True)
    borders = [0, *(round(math.fsum(shares[: i + 1]) * steps) for i in range(len(growth))), steps]
    spans = list(itertools.pairwise(borders))
    for stage, (start, end) in zip(growth, spans, strict=False):
        require(start < end, f"train.growth={_shown(growth)}: {stage} of train.steps={steps} is less than one step")
    require(borders[-2] < steps, f"train.growth={_shown(growth)} leaves none of train.steps={steps} to the whole model")
    routed = (start for (start, _), stage in zip(spans, models, strict=True) if stage.routing.kind != "none")
    routed_from = next(routed, 0)
    return tuple(Stage(*span, stage, routed_from) for span, stage in zip(spans, models, strict=True))


def _shown(growth: Sequence[GrowthStage]) -> str:
    return " ".join(map(str, growth))


def _check(model: ModelConfig, growth: Sequence[GrowthStage]) -> None:
    """Refuse stages that the model has not, or that fall back."""
    recursion, kind, what = model.recursion, model.routing.kind, f"train.growth={_shown(growth)}"
    require(
        recursion.sharing in ("cycle", "middle_cycle"),
        f"{what} counts passes of a whole block, which sharing={recursion.sharing!r} does not have "
        f"(use 'cycle' or 'middle_cycle')",
    )
    for stage in growth:
        count, most = stage.num_recursions, recursion.num_recursions
        require(0 < stage.share < 1, f"{what}: share {stage.share:g} is outside (0, 1)")
        require(1 <= count <= most, f"{what}: {count} is outside 1..num_recursions={most}")
        require(not stage.routed or kind != "none", f"{what}: {stage} is routed, but routing.kind='none'")
        require(
            not (stage.routed and kind == "token" and count < most),
            f"{what}: {stage} is routed, but token-choice's router scores all num_recursions={most} depths at once",
        )
    total = math.fsum(stage.share for stage in growth)
    require(total < 1, f"{what}: the shares add up to {total:g}, which must leave steps to the whole model")
    sizes = [(stage.num_recursions, stage.routed) for stage in growth]
    sizes.append((recursion.num_recursions, kind != "none"))
    for (passes, routed), (more, then) in itertools.pairwise(sizes):
        require(more >= passes and then >= routed, f"{what}: a stage falls back behind the one before it")

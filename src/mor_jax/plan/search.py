"""Try meshes, micro-batches and rematerialisation: rank by estimate, then let the compiler confirm the best.

A compilation takes minutes, an estimate microseconds: every combination that divides is estimated, those that cannot
fit are dropped, and only the fastest of the rest are compiled.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mor_jax.config import Config, MeshConfig, RematPolicy
from mor_jax.errors import UserError, require
from mor_jax.mesh.devices import GIB
from mor_jax.plan.compile import CompiledStep, DoesNotFitError, compile_step
from mor_jax.plan.memory import estimate_bytes
from mor_jax.plan.roofline import Roofline, estimate_received, roofline
from mor_jax.plan.topology import Topology

_log = logging.getLogger(__name__)
_MARGIN = 1.25
"""How far the memory estimate may exceed the limit before a candidate is dropped without compiling."""
_MIN_SHARD = 32
"""Least width of the model per `fsdp` shard: below, XLA pads the shards and all-reduces what it should gather."""
_MAX_ACCUMULATION = 64


@dataclass(frozen=True)
class Candidate:
    """A way to run the step, by estimate."""

    config: Config
    bytes: float
    """Estimated memory of one device."""
    bound: Roofline
    """Estimated time."""

    @property
    def label(self) -> str:
        """Flags that ask for it."""
        mesh, train = self.config.mesh, self.config.train
        axes = [f"--mesh.{axis} {size}" for axis, size in vars(mesh).items() if size not in (1, -1)]
        return " ".join([*axes, f"--train.accumulation {train.accumulation}", f"--perf.remat {self.config.perf.remat}"])


def candidates(config: Config, topology: Topology) -> list[Candidate]:
    """List what could fit, fastest by estimate first, were nothing overlapped.

    Tried are all `fsdp` and `tensor` sizes that divide, powers of two of micro-batches, and all rematerialisations;
    `context` and everything else stays as configured.
    """
    limit = topology.generation.program_bytes
    found = [_estimate(variant, topology) for variant in _variants(config, topology)]
    fitting = [candidate for candidate in found if candidate.bytes <= limit * _MARGIN]
    return sorted(fitting, key=lambda c: (c.bound.serial, c.bytes))


def advise(config: Config, topology: Topology) -> str:
    """Say what would fit, in words, by estimate."""
    for scale in (1, 2, 4, 8):  # more chips of the same kind, if it must be
        devices = len(topology.devices) * scale
        variants = (_estimate(v, topology, devices) for v in _variants(config, topology, devices))
        fitting = [c for c in variants if c.bytes <= topology.generation.program_bytes * 0.9]
        if fitting:
            best = min(fitting, key=lambda c: (c.bound.serial, c.bytes))
            where = "" if scale == 1 else f" on {topology.chips * scale} chips"
            return f"by estimate {best.bytes / GIB:.1f} GiB{where} with {best.label} (--search looks further)"
    return "by estimate nothing fits on up to eight times as many chips: take a chip with more memory"


def search(
    config: Config, topology: Topology, compilations: int, dump: Path | None = None
) -> tuple[list[CompiledStep], list[Candidate]]:
    """Compile the best candidates until enough of them are known to fit.

    Args:
        config: what is searched around.
        topology: from ``describe_topology``.
        compilations: how many compiled steps are wanted; at most twice as many are tried.
        dump: see ``compile_step``.

    Returns:
        (steps that fit, in the order of their estimate; all candidates by estimate).

    Raises:
        UserError: nothing divides, or nothing fits.
    """
    require(compilations > 0, f"search_compilations={compilations} must be positive")
    ranked = candidates(config, topology)
    if not ranked:
        raise UserError(f"{config.preset} cannot fit on {topology.label}: {advise(config, topology)}")
    fitting: list[CompiledStep] = []
    for candidate in ranked[: 2 * compilations]:
        if len(fitting) == compilations:
            break
        _log.info("compiling %s (estimated %.1f GiB)", candidate.label, candidate.bytes / GIB)
        try:
            fitting.append(compile_step(candidate.config, topology, dump=dump))
        except DoesNotFitError as error:
            _log.info("%s: %s", candidate.label, error)
    if not fitting:
        raise UserError(f"none of the best {2 * compilations} of {len(ranked)} candidates fits on {topology.label}")
    return fitting, ranked


def ranked_plans(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort plans of ``report``: by ``clock_and_network`` where they have a clock, else by the bound."""
    if all("clock" in plan for plan in plans):
        return sorted(plans, key=clock_and_network)
    return sorted(plans, key=lambda plan: -plan["estimate"]["tokens_per_second_at_most"])


def clock_and_network(plan: dict[str, Any]) -> float:
    """Seconds of a step by the clock, which leaves collectives out, and of what is received at the networks' peak."""
    estimate = plan["estimate"]["seconds"]
    return plan["clock"]["seconds"] + estimate["network"] + estimate["network_across"]


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _variants(config: Config, topology: Topology, devices: int | None = None) -> Iterator[Config]:
    """All combinations that divide the devices, the model and the batch."""
    model, context = config.model, config.mesh.context
    per_slice = (devices or len(topology.devices)) // topology.slices
    for tensor in _powers(math.gcd(model.num_kv_heads, math.gcd(model.d_ff, model.vocab_size))):
        for fsdp in _powers(model.d_model // _MIN_SHARD):
            if model.d_model % fsdp or model.num_heads % tensor or model.num_kv_heads % tensor:
                continue
            data, rest = divmod(per_slice, fsdp * tensor * context)
            if rest or data == 0:
                continue
            mesh = MeshConfig(slice=topology.slices, data=data, fsdp=fsdp, context=context, tensor=tensor)
            shards = topology.slices * data * fsdp
            for accumulation in _powers(min(_MAX_ACCUMULATION, config.train.batch_size // shards)):
                if config.train.batch_size % (accumulation * shards) == 0:
                    train = dataclasses.replace(config.train, accumulation=accumulation)
                    yield from (
                        dataclasses.replace(
                            config, mesh=mesh, train=train, perf=dataclasses.replace(config.perf, remat=remat)
                        )
                        for remat in get_args(RematPolicy)
                    )


def _estimate(config: Config, topology: Topology, devices: int | None = None) -> Candidate:
    sizes = dict(vars(config.mesh))
    bound = roofline(config, sizes, topology.generation, estimate_received(config, sizes))
    return Candidate(config, estimate_bytes(config, sizes), bound)

"""What a TPU took, beside what its compiler's clock had predicted: by kind of work, and where they differ most.

The clock was written without a TPU: where it is wrong, this table says so.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mor_jax.bench.communication import KernelEvent, collective_kind
from mor_jax.config import Config
from mor_jax.mesh.devices import chip_of
from mor_jax.plan import hlo
from mor_jax.plan.clock import COMMUNICATION, KINDS, Clock, kinds_of, read_clock
from mor_jax.plan.clock_kernels import kernel_costs
from mor_jax.plan.memory import tokens_per_device
from mor_jax.plan.topology import GENERATIONS

_log = logging.getLogger(__name__)
_UNKNOWN = "not in the program"
_SHOWN = 15


def beside_clock(
    events: Sequence[KernelEvent], text: str, dump: Path, config: Config, mesh: Mesh, steps: int
) -> dict[str, Any] | None:
    """Compare a profile of a step with the clock of its program; None, and a line in the log, where there is no clock.

    Args:
        events: operations of a trace, of this process's devices.
        text: of the compiled step.
        dump: folder that the compiler left its kernels' programs in.
        config: of the step.
        mesh: that it runs on.
        steps: that were traced.
    """
    device = mesh.devices.flat[0]
    chip = chip_of(device)
    generation = GENERATIONS.get(chip.name) if chip else None
    if generation is None:
        _log.info(
            "%s: no clock to compare with; programs for %s carry cycles", device.device_kind, ", ".join(GENERATIONS)
        )
        return None
    module = hlo.parse(text)
    rows = tokens_per_device(config, {str(axis): size for axis, size in mesh.shape.items()})
    costs = kernel_costs(module, dump, generation, rows // config.model.context_length)
    clock, hertz = read_clock(module, costs, generation), generation.chip.clock_hz
    assert hertz is not None
    shared_by = steps * len(mesh.local_devices)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        seconds[event.operation] += event.seconds / shared_by
    return compare(seconds, kinds_of(module), clock, hertz)


def compare(seconds: Mapping[str, float], kinds: Mapping[str, str], clock: Clock, hertz: float) -> dict[str, Any]:
    """Put measured seconds of a step beside predicted ones.

    Args:
        seconds: measured, by instruction.
        kinds: of the program's instructions.
        clock: of the program.
        hertz: of the device.

    Returns:
        ``kinds``, ``together`` (of those that have a clock) and ``operations`` (where the two differ most), each with
        ``measured_seconds`` and ``predicted_seconds``; ``left_out`` of the clock.
    """
    predicted: dict[str, float] = defaultdict(float)
    sources = {}
    for operation in clock.operations:
        predicted[operation.name] += operation.cycles / hertz
        sources[operation.name] = operation.source
    sums: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in (*KINDS, COMMUNICATION, _UNKNOWN)}
    rows = []
    for name in dict.fromkeys((*seconds, *predicted)):
        kind = kinds.get(name, COMMUNICATION if collective_kind(name) else _UNKNOWN)
        pair = (seconds.get(name, 0.0), predicted.get(name, 0.0))
        sums[kind] = [total + part for total, part in zip(sums[kind], pair, strict=True)]
        if kind in KINDS:
            rows.append({"name": name, "kind": kind, "source": sources.get(name, ""), **_pair(*pair)})
    rows.sort(key=lambda row: -abs(row["measured_seconds"] - row["predicted_seconds"]))
    clocked = [pair for kind, pair in sums.items() if kind in KINDS]
    return {
        "kinds": {kind: _pair(*pair) for kind, pair in sums.items() if any(pair)},
        "together": _pair(*(sum(pair[index] for pair in clocked) for index in (0, 1))),
        "operations": rows[:_SHOWN],
        "left_out": dict(clock.left_out),
    }


def _pair(measured: float, predicted: float) -> dict[str, float]:
    return {"measured_seconds": measured, "predicted_seconds": predicted}

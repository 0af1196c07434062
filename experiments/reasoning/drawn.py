"""Training with a number of passes drawn for every step from 1, ..., N_r: one program for each, chosen on the host."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config, Stage, fewer_passes
from mor_jax.model.flops import train_flops_per_token
from mor_jax.runs.state import TrainState
from mor_jax.train.objective import ARRAYS, Batch
from mor_jax.train.step import Metrics, compile_train_step

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def passes_of(seed: int, step: int, most: int) -> int:
    """Return the passes of a step, 1, ..., ``most``: a function of seed and step, so that a resumed run draws alike."""
    return 1 + int(np.random.default_rng((seed, step)).integers(most))


def drawn_flops(config: Config) -> float:
    """Return the exact training FLOPs of a run: every step by the number of passes that was drawn for it."""
    model, steps = config.model, config.train.steps
    counts = Counter(passes_of(config.train.seed, step, model.recursion.num_recursions) for step in range(steps))
    tokens = config.train.batch_size * model.context_length
    of_step = {passes: tokens * train_flops_per_token(fewer_passes(model, passes)) for passes in counts}
    return sum(count * of_step[passes] for passes, count in counts.items())


def compile_drawn_step(config: Config, mesh: Mesh, stage: Stage | None = None, arrays: Sequence[str] = ARRAYS) -> Step:
    """Compile a step for every number of passes; arguments and result are those of ``compile_train_step``."""
    stage = stage or config.stages[-1]
    most = stage.model.recursion.num_recursions
    programs = [
        compile_train_step(config, mesh, dataclasses.replace(stage, model=fewer_passes(stage.model, passes)), arrays)
        for passes in range(1, most + 1)
    ]
    return _Drawn(programs, config.train.seed)


class _Drawn:
    """Counts the steps by itself after the first: reading them from the device would wait for it."""

    def __init__(self, programs: Sequence[Step], seed: int) -> None:
        self._programs, self._seed = programs, seed
        self._step: int | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step = int(state.step) if self._step is None else self._step
        self._step = step + 1
        return self._programs[passes_of(self._seed, step, len(self._programs)) - 1](state, batch)

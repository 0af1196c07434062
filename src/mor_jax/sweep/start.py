"""Where a run of a sweep starts from: a pinned checkpoint of another run, or a full model made recursive.

A branch (paper section 3.2 and table 9: smaller budgets share the stable phase of the largest) continues from the
stable phase of an earlier run and decays to its own end. Uptraining (table 12) is ``init.source`` with the earlier run
as its source.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from mor_jax.config import Config, InitConfig
from mor_jax.errors import require
from mor_jax.interop.uptrain import initial_weights
from mor_jax.runs.folder import claim_run_folder
from mor_jax.runs.metrics import read_metrics
from mor_jax.runs.optimizer import make_schedule
from mor_jax.runs.state import InitialWeights
from mor_jax.sweep.runs import SweepRun


def first_weights(run: SweepRun, folder: Path, config: Config) -> InitialWeights | None:
    """Load the weights that a run starts from, where it has no checkpoint yet.

    Args:
        run: placed in ``folder``.
        folder: of the run folders.
        config: what is trained.

    Returns:
        Those of the earlier run that ``run.start`` uptrains, otherwise those that ``config.init`` names.

    Raises:
        UserError: what ``initial_weights`` says.
    """
    if run.start is not None and run.start.strategy is not None:
        init = InitConfig(source=str(folder / run.start.run), strategy=run.start.strategy)
        config = dataclasses.replace(config, init=init)
    return initial_weights(config)


def prepare_branch(run: SweepRun, folder: Path) -> None:
    """Give a branch the checkpoint that it continues from, unless it has one already; other runs need nothing.

    Args:
        run: placed in ``folder``.
        folder: of the run folders.

    Raises:
        UserError: the earlier run lacks the checkpoint, or it lies beyond what the two have in common.
    """
    target = folder / run.name / "checkpoints"
    if run.start is None or run.start.step is None or (target.is_dir() and any(target.iterdir())):
        return
    _branch(run, folder / run.start.run, run.start.step, target)


def _branch(run: SweepRun, source: Path, step: int, target: Path) -> None:
    checkpoint = source / "checkpoints" / str(step)
    require(checkpoint.is_dir(), f"{checkpoint} is missing: {run.name!r} starts from it")
    train = run.config.train
    require(step < train.steps, f"{run.name!r} has train.steps={train.steps}, but starts from step {step}")
    grows = "has train.growth, whose stages depend on train.steps: it cannot start from another run's step"
    require(not train.growth, f"{run.name!r} {grows}")
    decays = make_schedule(run.config.optimizer, train.steps)
    require(
        float(decays(step)) == float(decays(run.config.optimizer.warmup_steps)),
        f"{run.name!r} starts from step {step}, where its learning rate has already left the stable phase",
    )
    claim_run_folder(run.config)
    lines = [line for line in read_metrics(source / "metrics.jsonl") if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (target.parent / "metrics.jsonl").write_text(text, encoding="utf-8")
    part = target.with_name("checkpoints.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(checkpoint, part / str(step))
    if target.exists():
        target.rmdir()
    part.rename(target)

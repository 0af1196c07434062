"""Where a run of a sweep starts from: a pinned checkpoint of another run, or a full model made recursive.

A branch (paper section 3.2 and table 9: smaller budgets share the stable phase of the largest) continues from the
stable phase of an earlier run and decays to its own end. Uptraining (table 12) ties the layers of a full model.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from mor_jax.data.pipeline import make_dataset
from mor_jax.errors import require
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.sharing import Strategy, share_layers
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.folder import claim_run_folder
from mor_jax.runs.metrics import read_metrics
from mor_jax.runs.optimizer import make_schedule
from mor_jax.runs.restore import restore_run
from mor_jax.runs.state import init_train_state
from mor_jax.sweep.runs import SweepRun


def prepare_start(run: SweepRun, folder: Path) -> None:
    """Give a run the checkpoint that it starts from, unless it has one already.

    Args:
        run: with a ``start``, placed in ``folder``.
        folder: of the run folders.

    Raises:
        UserError: the earlier run lacks the checkpoint, or the models do not fit.
    """
    assert run.start is not None
    target = folder / run.name / "checkpoints"
    if target.is_dir() and any(target.iterdir()):
        return
    if run.start.step is not None:
        _branch(run, folder / run.start.run, run.start.step, target)
    elif run.start.strategy is not None:
        _uptrain(run, folder / run.start.run, run.start.strategy, target)


def _branch(run: SweepRun, source: Path, step: int, target: Path) -> None:
    checkpoint = source / "checkpoints" / str(step)
    require(checkpoint.is_dir(), f"{checkpoint} is missing: {run.name!r} starts from it")
    train = run.config.train
    require(step < train.steps, f"{run.name!r} has train.steps={train.steps}, but starts from step {step}")
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


def _uptrain(run: SweepRun, source: Path, strategy: Strategy, target: Path) -> None:
    config = run.config
    full = restore_run(source)
    seed = config.train.seed
    key = jax.random.key(seed)
    params = share_layers(full.config.model, full.params, config.model, strategy, key=key, seed=seed)
    mesh = make_mesh(config.mesh)
    state = init_train_state(config, mesh)
    tied = jax.tree.map(lambda leaf, old: jax.device_put(jnp.asarray(leaf), old.sharding), params, state.params)
    model = config.model
    dataset = make_dataset(
        config.data,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        batch_size=config.train.batch_size,
    )
    claim_run_folder(config)
    checkpoints = Checkpoints(target, keep=1)
    try:
        checkpoints.save(dataclasses.replace(state, params=tied), data_step=0, data_hash=dataset.hash)
        checkpoints.wait()
    finally:
        checkpoints.close()
        dataset.close()

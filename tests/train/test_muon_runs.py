"""Runs with Muon: resumed bit for bit, refused by AdamW, and read for their weights by anyone."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import dataset_maker, read_lines, saved_fingerprints, tiny_config, with_train

from mor_jax.config import Config
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import abstract_model_state, abstract_train_state
from mor_jax.train.loop import train


def _config(runs: Path) -> Config:
    config = with_train(tiny_config(runs), save_every=2, steps=4)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="muon"))


def _adamw(config: Config) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="adamw"))


def _run(config: Config, crash_at: int | None = None) -> Path:
    make = dataset_maker(config)

    def making(*arguments, **rest):
        dataset = make(*arguments, **rest)
        if crash_at is not None and rest["split"] == "train":
            batch = dataset.batch
            dataset.batch = lambda step: batch(step) if step < crash_at else 1 / 0
        return dataset

    return train(config, make_dataset=making, devices=jax.devices()[:1])


@contextmanager
def _checkpoints(folder: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, read_only=True)
    yield checkpoints
    checkpoints.close()


def test_a_run_is_resumed_bit_for_bit_and_stays_muons(tmp_path):
    straight = _run(_config(tmp_path / "straight"))
    config = _config(tmp_path / "broken")
    with pytest.raises(ZeroDivisionError):
        _run(config, crash_at=3)
    folder = _run(config)
    assert read_lines(folder) == read_lines(straight)
    assert saved_fingerprints(folder, 4) == saved_fingerprints(straight, 4)
    with pytest.raises(UserError, match=r"another configuration: optimizer.kind: 'muon' -> 'adamw' \("):
        _run(_adamw(config))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with (
        _checkpoints(folder) as checkpoints,
        pytest.raises(UserError, match=r"4 is of another optimiser \(optimizer.kind\): opt_state/"),
    ):
        checkpoints.restore(abstract_train_state(_adamw(config), mesh))
    with _checkpoints(folder) as checkpoints:
        whole = checkpoints.restore(abstract_train_state(config, mesh))
        assert whole is not None
        weights = checkpoints.restore_model(abstract_model_state(config.model, whole.state.step.sharding))
    assert weights is not None
    jax.tree.map(np.testing.assert_array_equal, weights.params, whole.state.params)

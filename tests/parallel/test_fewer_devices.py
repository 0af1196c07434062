"""A run that loses devices: 8, then 4, then 2, over checkpoints, with other mesh axes each time."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from sharded_programs import tiny_runs

from mor_jax.config import Config, MeshConfig
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.fingerprint import fingerprints
from mor_jax.runs.state import abstract_train_state, init_train_state
from mor_jax.train.step import compile_train_step

STEPS = 20
LEGS = [
    (8, MeshConfig(data=2, fsdp=2, context=2), 7),
    (4, MeshConfig(fsdp=2, tensor=2), 14),
    (2, MeshConfig(context=2), STEPS),
]


def run(config: Config, state: Any, mesh: Any, until: int) -> tuple[Any, list[float]]:
    executable, losses = compile_train_step(config, mesh), []
    for step in range(int(state.step), until):
        state, metrics = executable(state, shard_batch(mesh, tiny_runs.make_batch(config, step)))
        losses.append(float(metrics["loss"]))
    return state, losses


def prints_of(state: Any) -> Any:
    tree = {"params": state.params, "opt_state": state.opt_state, "bias": state.router_bias_R}
    return jax.device_get(fingerprints(tree))


@pytest.mark.slow
def test_eight_then_four_then_two_devices_train_like_one(tmp_path: Path):
    config = tiny_runs.tiny_config(steps=STEPS)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, straight = run(config, init_train_state(config, mesh), mesh, STEPS)

    losses, saved_prints = [], None
    for devices, mesh_config, until in LEGS:
        leg = dataclasses.replace(config, mesh=mesh_config)
        mesh = make_mesh(mesh_config, jax.devices()[:devices])
        checkpoints = Checkpoints(tmp_path, keep=1)
        restored = checkpoints.restore(abstract_train_state(leg, mesh))
        state = init_train_state(leg, mesh) if restored is None else restored.state
        assert (saved_prints is None) == (restored is None)
        if saved_prints is not None:
            assert prints_of(state) == saved_prints
        state, new = run(leg, state, mesh, until)
        losses += new
        saved_prints = prints_of(state)
        checkpoints.save(state, data_step=until, data_hash="tiny")
        checkpoints.close()

    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, straight, rtol=1e-5)

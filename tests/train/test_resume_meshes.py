"""Twenty float32 steps on 8, then 4, then 2 devices are the twenty steps of one device."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_runs import TinyDataset, dataset_maker, read_lines, saved_fingerprints, tiny_config

from mor_jax.config import Config, MeshConfig
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.fingerprint import fingerprints
from mor_jax.runs.state import abstract_train_state
from mor_jax.train.loop import train

STEPS, SAVE_EVERY = 20, 7
MESHES = ((8, MeshConfig(data=4, fsdp=2)), (4, MeshConfig(fsdp=2, tensor=2)), (2, MeshConfig(fsdp=2)))


def _crashing(config: Config, at: int, record: Path) -> Any:
    class Crashing(TinyDataset):
        def batch(self, step: int) -> Any:
            if self.steps is None and step == at:
                raise RuntimeError("power cut")
            return super().batch(step)

    return lambda _, *, split, batch_size, rows=None, **rest: Crashing(config, split, batch_size, record, rows)


def _restored_fingerprints(config: Config, folder: Path, devices: int) -> tuple[int, list[int]]:
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    restored = checkpoints.restore(abstract_train_state(config, mesh))
    checkpoints.close()
    assert restored is not None
    tree = {**vars(restored.state), "key": jax.random.key_data(restored.state.key)}
    return int(restored.state.step), [int(x) for x in jax.tree.leaves(jax.device_get(fingerprints(tree)))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves behind
def test_fewer_devices_at_every_resume_change_nothing(tmp_path):
    straight = tiny_config(tmp_path / "straight", steps=STEPS, save_every=SAVE_EVERY)
    wanted = train(straight, make_dataset=dataset_maker(straight, tmp_path / "a"), devices=jax.devices()[:1])
    base = tiny_config(tmp_path / "moved", steps=STEPS, save_every=SAVE_EVERY)
    folder = tmp_path / "moved" / "tiny"
    for (devices, mesh), crash in zip(MESHES, (9, 16, None), strict=True):
        config = dataclasses.replace(base, mesh=mesh)
        if folder.exists():
            step, prints = _restored_fingerprints(config, folder, devices)
            assert step == (7 if devices == 4 else 14)
            assert sorted(prints) == sorted(leaf["fingerprint"] for leaf in saved_fingerprints(folder, step).values())
        if crash is None:
            train(config, make_dataset=dataset_maker(config, tmp_path / "b"), devices=jax.devices()[:devices])
            continue
        make = _crashing(config, crash, tmp_path / "b")
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, make_dataset=make, devices=jax.devices()[:devices])
    lines, expected = read_lines(folder), read_lines(wanted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert set((tmp_path / "a").read_text().splitlines()) == set((tmp_path / "b").read_text().splitlines())

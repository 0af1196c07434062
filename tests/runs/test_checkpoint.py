"""Checkpoints: what is kept, moved between meshes, verified, and refused; fingerprints that see one bit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import tiny_config  # pyright: ignore[reportMissingImports]

from mor_jax.config import Config, MeshConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.fingerprint import fingerprints
from mor_jax.runs.state import TrainState, abstract_train_state, init_train_state

CONFIG = tiny_config(routing=RoutingConfig())


def _mesh(config: MeshConfig | None = None, devices: int = 1):
    return make_mesh(config or MeshConfig(), jax.devices()[:devices])


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A state whose every part differs from its initial value."""
    state = init_train_state(CONFIG, _mesh())
    return state.replace(router_bias_R=jnp.array([0.25, -0.5]))  # pyright: ignore[reportAttributeAccessIssue]


def _at(state: TrainState, step: int) -> TrainState:
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def _save(folder: Path, state: TrainState, *steps: int, keep: int = 2, pinned: tuple[int, ...] = ()) -> None:
    checkpoints = Checkpoints(folder, keep=keep, pinned_steps=pinned)
    for step in steps:
        checkpoints.save(_at(state, step), data_step=step + 100, data_hash="h")
    checkpoints.close()


def _restore(folder: Path, config: Config = CONFIG, mesh=None):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(abstract_train_state(config, mesh or _mesh()))
    finally:
        checkpoints.close()


def _assert_same(a: TrainState, b: TrainState) -> None:
    as_data = lambda s: dataclasses.replace(s, key=jax.random.key_data(s.key))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, as_data(a), as_data(b))


def test_state_key_and_data_position_come_back(state, tmp_path):
    _save(tmp_path, state, 7)
    restored = _restore(tmp_path)
    assert restored is not None
    assert (restored.data_step, restored.data_hash) == (107, "h")
    _assert_same(restored.state, _at(state, 7))
    jax.random.uniform(restored.state.key)  # a typed key again


def test_an_empty_folder_restores_nothing(tmp_path):
    assert _restore(tmp_path) is None


def test_the_newest_and_the_pinned_are_kept(state, tmp_path):
    _save(tmp_path, state, 1, 2, 3, 4, keep=2, pinned=(1,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]


def test_a_restored_state_takes_the_shardings_of_another_mesh(state, tmp_path):
    _save(tmp_path, state, 1)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    restored = _restore(tmp_path, config, _mesh(config.mesh, 4))
    assert restored is not None
    _assert_same(restored.state, _at(state, 1))
    assert len(restored.state.params["embedding"]["embedding"].addressable_shards) == 4
    assert restored.state.params["embedding"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_a_half_written_checkpoint_is_removed_and_the_one_before_it_used(state, tmp_path):
    _save(tmp_path, state, 1)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("")
    restored = _restore(tmp_path)
    assert restored is not None and int(restored.state.step) == 1
    assert not half.exists()


def test_a_reader_follows_a_run_that_replaces_its_checkpoints(state, tmp_path):
    _save(tmp_path, state, 1)
    reader = Checkpoints(tmp_path, keep=1, read_only=True)
    assert reader.steps() == [1]
    _save(tmp_path, state, 2, keep=1)  # deletes step 1
    restored = reader.restore(abstract_train_state(CONFIG, _mesh()))
    reader.close()
    assert restored is not None and int(restored.state.step) == 2


def test_changed_bits_are_named_and_the_step_before_is_used(state, tmp_path, caplog):
    """The arrays of one save under the description of another: what a flipped bit in an array looks like."""
    _save(tmp_path, state, 1, 2)
    other = tmp_path / "other"
    params = {**state.params, "final_norm": {"scale": state.params["final_norm"]["scale"].at[3].add(1e-7)}}
    _save(other, dataclasses.replace(state, params=params), 2)
    about = Path("2") / "about" / "metadata"
    (tmp_path / about).write_bytes((other / about).read_bytes())
    restored = _restore(tmp_path)
    assert restored is not None and int(restored.state.step) == 1
    assert "checkpoint 2 is damaged" in caplog.text and "params/final_norm/scale" in caplog.text
    assert (tmp_path.parent / "checkpoints-damaged" / "2").is_dir()


def test_another_model_is_refused_leaf_by_leaf_and_nothing_moves(state, tmp_path):
    _save(tmp_path, state, 1)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, d_ff=96, tie_embeddings=False))
    with pytest.raises(UserError, match=r"of another model: .*head/kernel is missing") as error:
        _restore(tmp_path, config)
    assert "down is float32[2, 64, 32] but the model needs float32[2, 96, 32]" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_only_damaged_checkpoints_is_an_error_and_nothing_moves(state, tmp_path):
    _save(tmp_path, state, 1)
    (tmp_path / "1" / "about" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"all checkpoints are damaged \(steps \[1\]\)"):
        _restore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_fingerprints_do_not_depend_on_the_mesh_and_see_one_bit_and_a_swap():
    x = {"w": jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.ones((8,), jnp.bfloat16), "i": jnp.arange(4)}
    wanted = jax.device_get(fingerprints(x))
    mesh = _mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(("data", "fsdp")), PartitionSpec(None, "tensor")):
        sharded = x | {"w": jax.device_put(x["w"], NamedSharding(mesh, spec))}
        assert jax.device_get(fingerprints(sharded)) == wanted
    flipped = np.array(x["w"])
    flipped.view(np.uint32)[7, 5] ^= 1
    swapped = np.array(x["w"])
    swapped[[0, 1]] = swapped[[1, 0]]
    for other in (flipped, swapped):
        assert int(fingerprints(x | {"w": jnp.asarray(other)})["w"]) != int(wanted["w"])

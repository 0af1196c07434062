"""The weights of a run alone: what is read, what still counts as damage, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny_config  # pyright: ignore[reportMissingImports]

from mor_jax.config import Config, RoutingConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.restore import restore_run
from mor_jax.runs.state import TrainState, abstract_train_state, init_train_state

MODEL = dataclasses.replace(tiny_config().model, vocab_size=257, d_model=64, d_ff=512)
CONFIG = dataclasses.replace(tiny_config(), model=MODEL)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """Moments that do not compress, as after training."""
    state = init_train_state(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    key = jax.random.key(1)
    noise = lambda x: jax.random.normal(key, x.shape) if x.ndim else x  # noqa: E731
    return dataclasses.replace(
        state,
        opt_state=jax.tree.map(noise, state.opt_state),
        router_bias_R=jnp.array([0.25, -0.5]),
        boundaries_R=jnp.array([-jnp.inf, 0.125]),
    )


def _save(run: Path, state: TrainState, *steps: int) -> Path:
    run.mkdir(exist_ok=True)
    config_io.save(CONFIG, run / "config.json")
    Tokenizer.bytes_level().save(run / "tokenizer.json")
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    for step in steps:
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), data_step=step, data_hash="h")
    checkpoints.close()
    return run


def _under_the_description_of(run: Path, other: TrainState, step: int) -> None:
    """Leave the arrays and exchange the fingerprints: what flipped bits in the arrays look like."""
    described = _save(run / "other", other, step)
    about = Path("checkpoints") / str(step) / "about" / "metadata"
    (run / about).write_bytes((described / about).read_bytes())


def _restore_all(run: Path, config: Config = CONFIG):
    checkpoints = Checkpoints(run / "checkpoints", keep=2, read_only=True)
    try:
        return checkpoints.restore(abstract_train_state(config, make_mesh(config.mesh, jax.devices()[:1])))
    finally:
        checkpoints.close()


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: from the page cache, too


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_only_the_bytes_of_the_weights_are_read(state, tmp_path):
    run = _save(tmp_path / "run", state, 3)
    weights = sum(x.nbytes for x in jax.tree.leaves(state.params))
    read = []
    for restore in (restore_run, _restore_all):
        restore(run)  # compiles the fingerprints
        before = _bytes_read()
        restore(run)
        read.append((_bytes_read() - before) / weights)
    assert 0.8 < read[0] < 1.2, "beside the weights only descriptions, some kilobytes"
    assert read[1] > 2.5, "the moments are there, and are read to resume"
    restored = restore_run(run)
    assert restored.step == 3
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    np.testing.assert_array_equal(restored.router_bias_R, state.router_bias_R)
    np.testing.assert_array_equal(restored.weights.boundaries_R, state.boundaries_R)
    assert restored.boundaries == (0.0, 0.125)


def test_weights_go_straight_to_the_device_asked_for(state, tmp_path):
    restored = restore_run(_save(tmp_path / "run", state, 1), device=jax.devices()[3])
    places = {device for x in jax.tree.leaves(restored.weights) for device in x.devices()}
    assert places == {jax.devices()[3]}


def test_a_damaged_moment_matters_to_training_only(state, tmp_path, caplog):
    run = _save(tmp_path / "run", state, 1, 2)
    other = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state.opt_state)
    _under_the_description_of(run, dataclasses.replace(state, opt_state=other), 2)
    assert restore_run(run).step == 2
    assert "damaged" not in caplog.text
    resumed = _restore_all(run)
    assert resumed is not None and int(resumed.state.step) == 1
    assert "checkpoint 2 is damaged" in caplog.text and "opt_state/" in caplog.text


def test_damaged_weights_are_named_and_the_step_before_is_used(state, tmp_path, caplog):
    run = _save(tmp_path / "run", state, 1, 2)
    params = {**state.params, "final_norm": {"scale": state.params["final_norm"]["scale"].at[3].add(1e-7)}}
    _under_the_description_of(run, dataclasses.replace(state, params=params), 2)
    assert restore_run(run).step == 1
    assert "checkpoint 2 is damaged" in caplog.text and "params/final_norm/scale" in caplog.text
    assert (run / "checkpoints" / "2").is_dir(), "a reader moves nothing"


def test_another_model_is_refused_leaf_by_leaf(state, tmp_path):
    run = _save(tmp_path / "run", state, 1)
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, d_ff=96, tie_embeddings=False))
    config_io.save(wider, run / "config.json")
    with pytest.raises(UserError, match=r"of another model: .*head/kernel is missing") as error:
        restore_run(run)
    assert "ffn/down is float32[2, 512, 64] but the model needs float32[2, 96, 64]" in str(error.value)
    narrower = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, routing=RoutingConfig("none")))
    config_io.save(narrower, run / "config.json")
    with pytest.raises(UserError, match="router/kernel is not in the model"):
        restore_run(run)


def test_what_is_no_run_is_refused(state, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        restore_run(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoints"):
        restore_run(tmp_path)
    run = _save(tmp_path / "run", state)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        restore_run(run)

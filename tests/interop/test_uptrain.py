"""Runs that start from another model: the shared weights, low-rank updates, resuming, and refusals."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_llama import TINY, random_params, write

from mor_jax.config import (
    Config,
    InitConfig,
    LoraTarget,
    ModelConfig,
    RecursionConfig,
    RelaxationConfig,
    RoutingConfig,
)
from mor_jax.errors import UserError
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.uptrain import initial_weights
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.parameters import ROUTER_STATE
from mor_jax.model.relaxation import update_of
from mor_jax.model.sharing import share_layers, unrolled_sources
from mor_jax.model.transformer import init_params
from mor_jax.runs.state import init_train_state, place_weights
from mor_jax.train.loop import train

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from tiny_runs import dataset_maker, read_lines, tiny_config  # pyright: ignore[reportMissingImports]

FULL = dataclasses.replace(TINY, num_layers=6)
GROUPS: dict[LoraTarget, str] = {"query": "attention", "output": "attention", "down": "ffn"}
MOR = RecursionConfig(2, "middle_cycle")


def _config(folder: Path, model: ModelConfig, **init) -> Config:
    return dataclasses.replace(Config(model=model), init=InitConfig(source=str(folder), **init))


def test_a_mor_model_takes_the_released_layers_of_a_full_one(tmp_path):
    params = random_params(FULL)
    write(tmp_path, FULL, params)
    model = dataclasses.replace(FULL, recursion=MOR, routing=RoutingConfig("expert"))
    first = initial_weights(_config(tmp_path, model, strategy="lower"))
    assert first is not None
    np.testing.assert_array_equal(first.params["block"]["ffn"]["down"], params["block"]["ffn"]["down"][1:3])
    np.testing.assert_array_equal(first.params["last"]["ffn"]["down"], params["block"]["ffn"]["down"][5])
    assert first.params["router"]["kernel"].shape == (2, 16, 1)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(first.params)


@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
def test_low_rank_updates_of_full_rank_give_the_full_model_back(sharing):
    relaxation = RelaxationConfig(lora_rank=16, lora_scale=0.5)
    recursion = RecursionConfig(2, sharing, relaxation=relaxation)
    model = dataclasses.replace(FULL, recursion=recursion)
    params = random_params(FULL)
    built = share_layers(FULL, params, model, "average", key=jax.random.key(0))
    for recursion_index, row in enumerate(unrolled_sources(model)):
        for layer, source in enumerate(row):
            targets: tuple[tuple[LoraTarget, str], ...] = (
                ("query", "attention"),
                ("output", "attention"),
                ("down", "ffn"),
            )
            for target, group in targets:
                update = update_of(model, built["lora"], target, recursion_index, layer)
                total = built["block"][group][target][layer] + update
                np.testing.assert_allclose(total, params["block"][group][target][source], atol=1e-5)


def test_a_low_rank_update_is_the_best_of_its_rank():
    relaxation = RelaxationConfig(lora_rank=3, lora_targets=("down",))
    model = dataclasses.replace(FULL, recursion=RecursionConfig(2, "middle_cycle", relaxation=relaxation))
    params = random_params(FULL)
    built = share_layers(FULL, params, model, "stepwise", key=jax.random.key(0))
    source = unrolled_sources(model)[1][0]
    residual = params["block"]["ffn"]["down"][source] - built["block"]["ffn"]["down"][0]
    left = residual - update_of(model, built["lora"], "down", 1, 0)
    expected = np.sqrt(np.sum(np.linalg.svd(residual, compute_uv=False)[3:] ** 2))  # Eckart and Young
    assert np.linalg.norm(left) == pytest.approx(expected, rel=1e-5)


def test_a_run_starts_from_the_weights_and_resumes_without_them(tmp_path):
    config = tiny_config(tmp_path, steps=2, save_every=1)
    full = dataclasses.replace(
        config.model, recursion=RecursionConfig(), routing=RoutingConfig(), attend_across_documents=True
    )
    params = random_params(full)
    params = jax.tree.map(lambda x: 0.1 * x, params)
    (tmp_path / "full").mkdir()
    write(tmp_path / "full", full, params)
    config = dataclasses.replace(config, init=InitConfig(source=str(tmp_path / "full")))
    options = {"make_dataset": dataset_maker(config), "devices": jax.devices()[:1]}
    with pytest.raises(UserError, match="needs train"):
        train(config, **options)
    folder = train(config, **options, initial_weights=initial_weights)
    random = train(tiny_config(tmp_path, steps=2, name="random"), **options)
    assert read_lines(folder)[0]["param_norm"] != read_lines(random)[0]["param_norm"]
    (tmp_path / "full" / "model.safetensors").unlink()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    train(longer, **options, initial_weights=initial_weights)
    assert [line["step"] for line in read_lines(folder)] == [1, 2, 3]


def test_the_bias_of_loss_free_balancing_comes_along(tmp_path):
    config = tiny_config(tmp_path, RoutingConfig("token", score="softmax", alpha=1.0, balancing="loss_free"))
    params, bias_R = random_params(config.model), np.array([0.25, -0.25], np.float32)
    (tmp_path / "source").mkdir()
    weights.save(tmp_path / "source", config.model, {**params, ROUTER_STATE: {"bias": bias_R}}, None, origin="a test")
    config = dataclasses.replace(config, init=InitConfig(source=str(tmp_path / "source")))
    first = initial_weights(config)
    assert first is not None and ROUTER_STATE not in first.params
    state = place_weights(init_train_state(config, make_mesh(config.mesh, jax.devices()[:1])), first)
    np.testing.assert_array_equal(state.router_bias_R, bias_R)


def test_models_that_do_not_fit_are_refused_by_field(tmp_path):
    write(tmp_path, FULL, random_params(FULL))
    wider = dataclasses.replace(FULL, d_ff=32, recursion=MOR)
    with pytest.raises(UserError, match="the models differ in d_ff: 24 -> 32"):
        initial_weights(_config(tmp_path, wider))
    other = dataclasses.replace(FULL, rope_theta=5e5, recursion=MOR)
    with pytest.raises(UserError, match=r"other constants: --model.rope_theta 10000.0 \(now 500000.0\)"):
        initial_weights(_config(tmp_path, other))
    with pytest.raises(UserError, match="is no folder"):
        initial_weights(_config(tmp_path / "none", FULL))
    assert initial_weights(Config()) is None

"""Starting from a full model: the released layer choices, weights bit for bit, and the resulting logits."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.interop import official
from mor_jax.interop.description import describe
from mor_jax.interop.tensors import tensors
from mor_jax.model.forward import forward
from mor_jax.model.sharing import full_config, kept_layers, share_layers, source_layers
from mor_jax.model.transformer import init_params

FIXTURES = Path(__file__).parent.parent / "fixtures" / "goldens"
FOLDER = Path(os.environ.get("MOR_GOLDENS", FIXTURES))
"""The compact cases in the repository, or the full folder, which has more."""
CASES = sorted(path.stem for path in FOLDER.glob("init_*.npz"))
STRATEGIES = ("stepwise", "average", "lower", "upper", "random")
KEY = jax.random.key(0)


def _read(name: str):
    """Arrays, metadata and the recursive model of one case."""
    with np.load(FOLDER / f"{name}.npz") as file:
        case = {key: file[key] for key in file.files}
    meta = json.loads(str(case["meta_json"]))
    sizes = meta["model"]
    config = ModelConfig(
        vocab_size=sizes["vocab_size"], num_layers=meta["num_hidden_layers_requested"], d_model=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"], num_kv_heads=sizes["num_key_value_heads"], head_dim=sizes["head_dim"],
        d_ff=sizes["intermediate_size"], context_length=8, tie_embeddings=False, dtype="float32",
        recursion=RecursionConfig(
            meta["num_recursion"], meta["sharing"], share_norms=meta["ln_share"], base_depth=meta["base_depth_config"]
        ),
    )  # fmt: skip
    return case, meta["strategies"], config


def _shared(case, config, strategy, seed):
    full = full_config(config)
    vanilla = {name.removeprefix("vanilla/"): case[name] for name in case if name.startswith("vanilla/")}
    _, params = official.load(describe(full), vanilla)
    return vanilla, share_layers(full, params, config, strategy, key=KEY, seed=seed)


def test_the_cases_exist():
    assert len(CASES) == (4 if FOLDER == FIXTURES else 10)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_released_ones_bit_for_bit(name, strategy):
    case, strategies, config = _read(name)
    expected = strategies[strategy]
    assert kept_layers(config) == expected["kept_layers"]
    vanilla, params = _shared(case, config, strategy, expected.get("numpy_seed", 0))
    state = official.export(config, params)[1]
    for tensor in tensors(config):
        for used_as in (tensor.name, *tensor.aliases):
            theirs = vanilla.get(used_as)
            if used_as.startswith("model.layers."):
                _, _, layer, rest = used_as.split(".", 3)
                source = expected["source_layer_of_each_layer"][int(layer)]
                theirs = case[f"average/{tensor.name}"] if source is None else vanilla[f"model.layers.{source}.{rest}"]
            np.testing.assert_array_equal(state[tensor.name], theirs, err_msg=used_as)


@pytest.mark.parametrize("name", CASES[1:3] if FOLDER == FIXTURES else CASES)
def test_logits_are_the_released_ones(name):
    case, strategies, config = _read(name)
    run = jax.jit(lambda params: forward(config, params, case["input_ids"]).logits)
    for strategy in STRATEGIES:
        _, params = _shared(case, config, strategy, strategies[strategy].get("numpy_seed", 0))
        np.testing.assert_allclose(run(params), case[f"{strategy}/eval_logits"], atol=2e-5)


def test_layers_that_do_not_divide_are_thinned_halves_to_even():
    config = ModelConfig(num_layers=10, recursion=RecursionConfig(3, "middle_cycle"))
    assert kept_layers(config) == [0, 1, 2, 4, 5, 7, 8, 9]
    assert source_layers(config, "average") == [[1, 4, 7], [2, 5, 8]]
    assert source_layers(config, "stepwise") == [[1], [8]]


def test_a_mor_model_gets_fresh_routers_and_the_rest_of_its_tree():
    full = ModelConfig(
        vocab_size=11, num_layers=8, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=8
    )
    config = dataclasses.replace(
        full,
        recursion=RecursionConfig(3, "middle_cycle", share_norms=False),
        routing=RoutingConfig("expert", sampling="aux_router"),
    )
    source = jax.jit(lambda key: init_params(full, key))(KEY)
    built = share_layers(full, source, config, "stepwise", key=KEY)
    shapes = jax.eval_shape(lambda key: init_params(config, key), KEY)
    assert jax.tree.map(lambda leaf: leaf.shape, built) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert np.std(built["router"]["kernel"]) > 0
    np.testing.assert_array_equal(built["last"]["ffn"]["down"], source["block"]["ffn"]["down"][7])


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        ({}, "middle", "init.strategy='middle' is not one of"),
        ({"recursion": RecursionConfig()}, "lower", "recursion.sharing='none'"),
        ({"d_ff": 16, "num_layers": 9}, "lower", "num_layers: 8 -> 9, d_ff: 12 -> 16"),
        ({"tie_embeddings": True}, "lower", "would drop the full model's own output head"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, strategy, message):
    config = ModelConfig(
        vocab_size=11, num_layers=8, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=8,
        tie_embeddings=False, recursion=RecursionConfig(2, "cycle"),
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        share_layers(full_config(config), {}, dataclasses.replace(config, **changes), strategy, key=KEY)

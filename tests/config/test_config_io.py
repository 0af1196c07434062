"""Configurations as JSON: `load(save(x)) == x`, and everything that is not exactly that is refused by name."""

import dataclasses
import json
import re
from typing import Any

import pytest

from mor_jax import presets
from mor_jax.config import (
    Config,
    DataConfig,
    GrowthStage,
    ModelConfig,
    RecursionConfig,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.config import io as config_io
from mor_jax.data.manifest import Manifest, Shard
from mor_jax.errors import UserError

FULL = Config(
    preset="mine",
    model=ModelConfig(
        num_layers=6,
        rope_theta=5e4,
        tie_embeddings=False,
        recursion=RecursionConfig(3, "cycle", share_norms=False, base_depth=2),
        routing=RoutingConfig("expert", capacities=(1.0, 0.5, 0.25), boundaries=(0.0, -0.5, 1e-7)),
    ),
    data=DataConfig(source="a,b", weights=(0.1, 0.3)),
    train=TrainConfig(pinned_steps=(3, 5), growth=(GrowthStage(0.5, 1), GrowthStage(0.25, 3, routed=True))),
)


@pytest.mark.parametrize("config", [Config(), FULL, presets.get("mor-1.7b-token-r4-share").config])
def test_round_trip(config, tmp_path):
    config_io.save(config, tmp_path / "config.json")
    assert config_io.load(Config, tmp_path / "config.json") == config
    assert config_io.from_dict(Config, json.loads(json.dumps(config_io.to_dict(config)))) == config


def test_absent_fields_take_their_defaults_and_whole_numbers_pass_for_floats():
    built = config_io.from_dict(ModelConfig, {"rope_theta": 10000})
    assert built == ModelConfig(rotary_positions="document") and isinstance(built.rope_theta, float)


def test_configurations_without_rotary_positions_restart_them():
    old = config_io.to_dict(FULL)
    del old["model"]["rotary_positions"]
    model = config_io.from_dict(Config, old).model
    assert model == dataclasses.replace(FULL.model, rotary_positions="document")
    assert config_io.from_dict(ModelConfig, config_io.to_dict(model)) == model


def test_the_attention_of_older_runs_on_tpus_is_todays():
    old = config_io.to_dict(FULL)
    old["perf"]["attention_backend"] = "splash"
    assert config_io.from_dict(Config, old).perf.attention_backend == "mosaic_tpu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown field 'modle'; did you mean 'model'?"),
        ({"model": {"num_head": 3}}, "unknown field 'model.num_head'; did you mean 'num_heads'?"),
        (
            {"model": {"recursion": {"recursions": 3}}},
            "unknown field 'model.recursion.recursions'; did you mean 'num_recursions'?",
        ),
        ({"zzz": 1}, "unknown field 'zzz'"),
        ({"model": 3}, "model=3 is not an object"),
        ({"model": {"num_heads": "15"}}, "model.num_heads='15' is not of type int"),
        ({"model": {"num_heads": 15.0}}, "model.num_heads=15.0 is not of type int"),
        ({"model": {"num_heads": True}}, "model.num_heads=True is not of type int"),
        ({"model": {"rope_theta": True}}, "model.rope_theta=True is not of type float"),
        ({"model": {"tie_embeddings": 1}}, "model.tie_embeddings=1 is not of type bool"),
        (
            {"model": {"rotary_positions": "rows"}},
            "model.rotary_positions='rows' is not one of 'row', 'document'",
        ),
        ({"model": {"dtype": "float64"}}, "model.dtype='float64' is not one of 'float32', 'bfloat16'"),
        ({"model": {"routing": {"capacities": 1.0}}}, "model.routing.capacities=1.0 is not a list"),
        ({"model": {"routing": {"capacities": [1.0, "x"]}}}, "model.routing.capacities[1]='x' is not of type float"),
        ({"data": {"seed": None}}, "data.seed=None is not of type int"),
        ({"model": {"num_heads": 9, "num_kv_heads": 2}}, "num_heads=9 is not divisible by num_kv_heads=2"),
    ],
)
def test_what_is_not_a_configuration_is_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        config_io.from_dict(Config, values)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b'{"model": {"d_modle": 4}}'])
def test_a_file_that_is_none_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        config_io.load(Config, path)


def test_missing_fields_without_defaults_are_named():
    good = {f.name: 1 for f in dataclasses.fields(Shard)} | {"file": "a", "split": "train", "sha256": "b"}
    bad = {name: value for name, value in good.items() if name not in ("file", "split", "rows")}
    with pytest.raises(UserError, match=re.escape("shards[1]: file, split, rows missing")):
        config_io.from_dict(Manifest, {"shards": [good, bad]})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not a readable configuration file"):
        config_io.load(Config, tmp_path / "config.json")


def test_differences_are_listed_by_path():
    other = dataclasses.replace(
        FULL,
        model=dataclasses.replace(FULL.model, rope_theta=1e4),
        train=dataclasses.replace(FULL.train, pinned_steps=()),
    )
    assert config_io.differences(FULL, other) == [
        "model.rope_theta: 50000.0 -> 10000.0",
        "train.pinned_steps: (3, 5) -> ()",
    ]
    assert config_io.differences(FULL, FULL) == []

"""Stages of growth: where they lie, what they train, how flags and files spell them, and what is refused."""

import dataclasses
import json
from typing import Any

import pytest

from mor_jax.config import (
    Config,
    GrowthStage,
    ModelConfig,
    OptimizerConfig,
    RecursionConfig,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.runs.folder import check_run_folder, claim_run_folder

THREE, EXPERT, TOKEN = (
    RecursionConfig(3, "middle_cycle"),
    RoutingConfig("expert"),
    RoutingConfig("token", score="softmax"),
)


def _config(*growth: str, routing: RoutingConfig = EXPERT, recursion: RecursionConfig = THREE, **train: Any) -> Config:
    return Config(
        model=ModelConfig(num_layers=8, recursion=recursion, routing=routing),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(**{"steps": 20, **train}, growth=tuple(map(GrowthStage.parse, growth))),
    )


def test_stages_lie_end_to_end_and_the_whole_model_is_last():
    config = _config("0.5:1", "0.2:2", "0.1:2:routed")
    found = [(s.start, s.end, s.model.recursion.num_recursions, s.model.routing.kind) for s in config.stages]
    assert found == [(0, 10, 1, "none"), (10, 14, 2, "none"), (14, 16, 2, "expert"), (16, 20, 3, "expert")]
    assert config.stages[-1].model == config.model
    assert {stage.model.block_depth for stage in config.stages} == {2}
    assert [stage.model.unrolled_depth for stage in config.stages] == [4, 6, 6, 8]
    assert config.stages[2].model.capacities == config.model.capacities[:2] == (1.0, 2 / 3)
    assert {stage.routed_from for stage in config.stages} == {14}
    steps = (0, 1, 10, 11, 14, 15, 20)
    assert [config.stages.index(config.stage_after(step)) for step in steps] == [0, 0, 0, 1, 1, 2, 3]


def test_without_growth_there_is_one_stage():
    config = _config()
    assert [(s.start, s.end, s.routed_from, s.model) for s in config.stages] == [(0, 20, 0, config.model)]


@pytest.mark.parametrize(
    ("growth", "fields", "message"),
    [
        (["0.5:1"], {"recursion": RecursionConfig(2, "sequence"), "routing": RoutingConfig()}, "sharing='sequence'"),
        (["0.5:1"], {"recursion": RecursionConfig(), "routing": RoutingConfig()}, "sharing='none' does not have"),
        (["0:1"], {}, r"train.growth=0:1: share 0 is outside \(0, 1\)"),
        (["nan:1"], {}, r"share nan is outside \(0, 1\)"),
        (["0.5:0"], {}, "train.growth=0.5:0: 0 is outside 1..num_recursions=3"),
        (["0.5:4"], {}, "4 is outside 1..num_recursions=3"),
        (["0.5:1", "0.5:2"], {}, "the shares add up to 1, which must leave steps to the whole model"),
        (["0.5:2:routed"], {"routing": RoutingConfig()}, "0.5:2:routed is routed, but routing.kind='none'"),
        (["0.5:2:routed"], {"routing": TOKEN}, "token-choice's router scores all num_recursions=3 depths at once"),
        (["0.5:2", "0.2:1"], {}, "train.growth=0.5:2 0.2:1: a stage falls back behind the one before"),
        (["0.5:2:routed", "0.2:2"], {}, "a stage falls back"),
        (["0.01:1"], {}, "0.01:1 of train.steps=20 is less than one step"),
        (["0.99:1"], {}, "train.growth=0.99:1 leaves none of train.steps=20 to the whole model"),
        (
            ["0.5:1"],
            {"routing": RoutingConfig("expert", capacity_warmup_steps=11)},
            "capacity_warmup_steps=11 exceeds train.steps=20, of which train.growth leaves 10 to routing",
        ),
    ],
)
def test_what_does_not_grow_is_refused(growth: list[str], fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        _config(*growth, **fields)


def test_growth_is_one_word_a_stage_and_survives_json():
    stage = GrowthStage.parse("0.25:2:routed")
    assert stage == GrowthStage(0.25, 2, routed=True) and str(stage) == "0.25:2:routed"
    for word in ("0.5", "0.5:1:rooted", "half:1", "0.5:1:routed:"):
        with pytest.raises(ValueError, match=r"\w"):
            GrowthStage.parse(word)
    config = _config("0.5:1", "0.2:2:routed")
    values = json.loads(json.dumps(config_io.to_dict(config)))
    assert values["train"]["growth"][1] == {"share": 0.2, "num_recursions": 2, "routed": True}
    assert config_io.from_dict(Config, values) == config
    values["train"]["growth"][1] = {"share": 0.2, "passes": 2}
    with pytest.raises(UserError, match=r"unknown field 'train.growth\[1\].passes'"):
        config_io.from_dict(Config, values)


def test_a_run_that_grows_is_not_extended(tmp_path):
    """More steps would move the stages under what has been trained."""
    config = _config("0.5:1", runs=str(tmp_path), name="run")
    claim_run_folder(config)
    check_run_folder(config)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
    with pytest.raises(UserError, match=r"train.steps: 20 -> 40; train.growth's stages are shares of train.steps"):
        check_run_folder(longer)

"""Every preset: parameters against tables 3 and 6, forward FLOPs by the paper's count against its budgets."""

import pytest

from mor_jax import presets
from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.model.flops import count_parameters, paper_flops_per_token

BATCH_TOKENS = 1024 * 2048
MILLIONS = {  # without embedding, embedding: table 6
    "vanilla-135m": (106, 28),
    "vanilla-360m": (315, 47),
    "vanilla-730m": (654, 75),
    "vanilla-1.7b": (1610, 101),
}
TABLE_3 = {  # parameters without embedding in millions, budget in 1e18, steps
    "vanilla-360m": (315, 16.5, 9438),
    "recursive-360m-r2": (167, 16.5, 9438),
    "recursive-360m-r3": (118, 16.5, 9438),
    "recursive-360m-r4": (98, 16.5, 8883),
    "mor-360m-expert-r2": (167, 16.5, 12619),
    "mor-360m-expert-r3": (118, 16.5, 14161),
    "mor-360m-expert-r4": (98, 16.5, 14216),
    "mor-360m-token-r3": (118, 16.5, 14161),
    "mor-360m-expert-r3-share": (118, 16.5, 14672),
}
PAPER = [name for name in presets.names() if name not in ("demo", "debug")]


def _spent(name: str, steps: int) -> float:
    return paper_flops_per_token(presets.get(name).config.model) * steps * BATCH_TOKENS


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_table_6(name):
    count = count_parameters(presets.get(name).config.model)
    assert (round(count.non_embedding / 1e6), round(count.embedding / 1e6)) == pytest.approx(MILLIONS[name], abs=1.5)


@pytest.mark.parametrize("name", TABLE_3)
def test_parameters_steps_and_budget_are_those_of_table_3(name):
    millions, budget, steps = TABLE_3[name]
    config = presets.get(name).config
    assert config.train.steps == steps and config.train.batch_size * config.model.context_length == BATCH_TOKENS
    assert count_parameters(config.model).non_embedding / 1e6 == pytest.approx(millions, abs=0.6)
    assert _spent(name, steps) / 1e18 == pytest.approx(budget, rel=1e-4)


@pytest.mark.parametrize(("name", "budget"), [("mor-360m-expert-r2", 12.3), ("mor-360m-expert-r3", 11.0)])
def test_table_3_at_equal_tokens(name, budget):
    assert _spent(name, presets.TABLE_3_STEPS) / 1e18 == pytest.approx(budget, abs=0.05)


@pytest.mark.parametrize("name", PAPER)
def test_every_preset_spends_its_budget_and_pins_the_branches_of_smaller_ones(name):
    config = presets.get(name).config
    assert _spent(name, config.train.steps) == pytest.approx(presets.BUDGET, rel=5e-4)
    assert config.preset == name
    for budget in presets.BRANCH_BUDGETS:
        steps = presets.budget_steps(config.model, budget)
        assert _spent(name, steps) == pytest.approx(budget, rel=5e-3)
        assert round(0.8 * steps) in config.train.pinned_steps


@pytest.mark.parametrize(
    ("name", "depth", "unrolled"),
    [
        ("recursive-135m-r3", 10, 32),
        ("mor-360m-expert-r3", 10, 32),
        ("mor-360m-expert-r4", 8, 34),
        ("mor-730m-expert-r4", 6, 26),
        ("mor-1.7b-token-r3", 7, 23),
    ],
)
def test_layers_are_the_papers(name, depth, unrolled):
    model = presets.get(name).config.model
    assert (model.block_depth, model.unrolled_depth) == (depth, unrolled)


def test_packed_rows_are_one_text_for_the_papers_models_and_documents_for_the_small_ones():
    of_paper = [presets.get(name).config.model for name in PAPER]
    assert len(of_paper) == 76
    assert {(model.attend_across_documents, model.rotary_positions) for model in of_paper} == {(True, "row")}
    assert not any(presets.get(name).config.model.attend_across_documents for name in ("demo", "debug"))


@pytest.mark.parametrize("name", ["demo", "debug", "mor-360m-expert-r3-share"])
def test_configurations_survive_json(name, tmp_path):
    config = presets.get(name).config
    config_io.save(config, tmp_path / "config.json")
    assert config_io.load(Config, tmp_path / "config.json") == config


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'mor-360m-expert'; did you mean 'mor-360m-expert-r\d'\?"):
        presets.get("mor-360m-expert")

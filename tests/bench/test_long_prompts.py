"""experiments/serving/long_prompts.py at a tiny size: bytes follow the formula, and the table says what was found."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from experiment_script import load_script
from mor_jax.config import ModelConfig

FILE = Path(__file__).parents[2] / "experiments" / "serving" / "long_prompts.py"


@pytest.fixture(scope="module")
def script():
    return load_script("serving/long_prompts")


@pytest.mark.parametrize("shape", ["small", "360m"])
def test_all_models_of_a_shape_have_the_same_layers(script, shape):
    models = script.models(shape)
    assert list(models) == ["vanilla", "recursion", "shared"]
    assert [model.recursion.kv_strategy for model in models.values()] == ["recursion", "recursion", "shared"]
    assert len({model.unrolled_depth for model in models.values()}) == 1
    layers = models["vanilla"].num_layers
    shares = [script.expected_share(model, [1.0, 0.7, 0.2], layers) for model in models.values()]
    block = (layers - 2) / 3
    assert shares == pytest.approx([1.0, (2 + block * 1.9) / layers, (2 + block) / layers])


def test_bad_arguments_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["long_prompts.py", "--out", "x.json", "--lengths", "1"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "lengths=(1,) must be more than one token each" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_follow_the_formula(script, tmp_path):
    vanilla = ModelConfig(64, 5, 16, 2, 1, 8, 24, 64, dtype="float32", init_std=0.3)
    expert = dataclasses.replace(
        vanilla, recursion=script.RecursionConfig(3, "middle_cycle"), routing=script.RoutingConfig("expert")
    )
    shared = dataclasses.replace(expert, recursion=dataclasses.replace(expert.recursion, kv_strategy="shared"))
    settings = script.Settings(
        tmp_path / "found.json", lengths=(40, 75), completion=3, repeats=2, prefill_chunk=16, page_size=4,
        calibration_rows=4,
    )  # fmt: skip
    script.run(settings, {"vanilla": vanilla, "recursion": expert, "shared": shared})
    results = json.loads(settings.out.read_text())["results"]
    assert [r["model"] for r in results] == ["vanilla"] * 2 + ["recursion"] * 2 + ["shared"] * 2
    entry = 2 * 8 * 4  # bytes of a key and a value of one layer
    for result in results:
        assert result["compilations_after_warm_up"] == 0
        assert len(result["time_to_first_token_seconds"]) == 2 and min(result["time_to_first_token_seconds"]) > 0
        assert result["cached_tokens"] == result["prompt_tokens"] + 2
        peak, shares = result["peak_kv_bytes"], result["shares_reaching_each_recursion"]
        assert result["used_kv_share"] == pytest.approx(result["expected_kv_share"], rel=1e-9)
        groups = {"vanilla": 5, "recursion": 5, "shared": 3}[result["model"]]  # layers that a page of each group covers
        assert peak["used"] < peak["allocated"] <= peak["used"] + 4 * entry * groups
        assert result["model"] == "vanilla" or (shares[0] == 1 and 0 < shares[2] < shares[1] < 1)
    assert results[-1]["peak_kv_bytes"]["used"] == entry * 3 * 77
    rows = script.table(results).splitlines()
    assert len(rows) == 8 and rows[2].startswith("| 40 | vanilla |") and rows[7].startswith("| 75 | shared | 1.000, ")

"""experiments/throughput/optimizers.py times both optimisers on one model, in turn, and states what they cost."""

import json
import sys

import pytest

from experiment_script import load_script

TINY = (
    "debug:model.d_model=16,model.d_ff=16,model.head_dim=4,model.context_length=16,model.vocab_size=32,model.num_layers=1,"
    "model.recursion.num_recursions=1,model.recursion.sharing=none,model.routing.kind=none"
)


@pytest.fixture(scope="module")
def script():
    return load_script("throughput/optimizers")


@pytest.mark.slow
def test_both_optimisers_are_timed_in_turn(script, tmp_path, monkeypatch, capsys):
    target = tmp_path / "x.json"
    sizes = ("--rows", "2", "--steps", "2", "--warmup", "0", "--rounds", "2")
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--cases", TINY, *sizes, "--out", str(target)])
    assert script.main() == 0
    record = json.loads(target.read_text())
    (case,) = record["cases"]
    adamw, muon = case["adamw"], case["muon"]
    for kind, figures in (("adamw", adamw), ("muon", muon)):
        assert figures["config"]["optimizer"]["kind"] == kind
        assert len(figures["milliseconds_by_round"]) == 2 and figures["milliseconds"] > 0
    assert case["muon_over_adamw"] == muon["milliseconds"] / adamw["milliseconds"]
    assert adamw["model_flops"] == muon["model_flops"] > 0
    assert muon["optimizer_flops"] > adamw["optimizer_flops"] == 0
    assert adamw["last_loss"] != muon["last_loss"]
    assert record["device"] and record["versions"]["jax"] and record["command"][1] == "optimizers.py"
    assert f"ratio {case['muon_over_adamw']:.3f}" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--cases", "no-such", "--out", str(tmp_path / "x.json")])
    assert script.main() == 2
    assert capsys.readouterr().err.startswith("optimizers: ")
    assert not (tmp_path / "x.json").exists()

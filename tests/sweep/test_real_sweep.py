"""A sweep with real training: a trunk, a branch off its stable phase, and a recursive model made from it."""

import json

import pytest

from mor_jax.cli import main
from mor_jax.runs.metrics import read_metrics

MODEL = {"model.num_layers": 4, "model.d_model": 16, "model.d_ff": 32, "model.head_dim": 8, "model.context_length": 32}
VANILLA = {"model.recursion": {"num_recursions": 1, "sharing": "none"}, "model.routing": {"kind": "none"}}
TRAIN = {
    "train.batch_size": 8,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.eval_rows": 4,
    "train.log_every": 1,
}
QUIET = {"train.tensorboard": False, "train.pictures": False, "optimizer.warmup_steps": 1}


@pytest.mark.slow
def test_branches_and_uptraining_continue_what_they_start_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOR_CACHE", str(tmp_path / "cache"))
    common = MODEL | TRAIN | QUIET | {"data.cache": str(tmp_path / "data")}
    full = common | VANILLA
    runs = [
        {"name": "trunk", "set": full | {"train.steps": 10, "train.pinned_steps": [4]}},
        {"name": "branch", "set": full | {"train.steps": 5}, "start": {"run": "trunk", "step": 4}},
        {"name": "tied", "set": common | {"train.steps": 3}, "start": {"run": "trunk", "strategy": "stepwise"}},
    ]
    path, out = tmp_path / "sweep.json", tmp_path / "runs"
    runs.append({"name": "named", "set": common | {"train.steps": 3, "init.source": str(out / "trunk")}})
    path.write_text(json.dumps({"runs": runs}))
    assert main(["sweep", str(path), "--out", str(out), "--depth-curve"]) == 0
    trunk, branch, tied, named = json.loads((out / "results.json").read_text())
    assert [result["state"] for result in (trunk, branch, tied, named)] == ["done"] * 4
    assert named["nll"] == tied["nll"]
    before, after = ([line["loss"] for line in read_metrics(out / n / "metrics.jsonl")] for n in ("trunk", "branch"))
    assert after == before[:5]
    assert branch["nll"] != trunk["nll"]
    assert [point["max_depth"] for point in tied["depth_curve"]] == [1, 2]
    assert tied["depth_curve"][-1]["nll"] == tied["nll"] and tied["depth_curve"][0]["mean_depth"] == 1.0
    assert "| tied |" in capsys.readouterr().out

"""The sweeps of experiments/ build at every scale, claims name runs that exist, and the report says what was run."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment_script import load_script
from mor_jax.config import io as config_io
from mor_jax.model.flops import count_parameters
from mor_jax.sweep.execute import placed
from mor_jax.sweep.recipes import SCALES
from mor_jax.sweep.results import failed_result
from mor_jax.sweep.runs import load_sweep

FOLDER = Path(__file__).parent.parent / "experiments"
SWEEPS = sorted(FOLDER.glob("*/sweep.py"))


CLAIMS = load_script("claims").CLAIMS
RANKED = load_script("ranked")
TABLES = load_script("report_tables")
FIGURES = load_script("report_figures")
CLAIM_TABLES = load_script("report_claims")
REPORT = load_script("report")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_a_sweep_builds_and_is_described(path, tmp_path):
    for scale in SCALES:
        runs = load_sweep(path, scale)
        groups = {run.group for run in runs}
        assert all(placed(run, tmp_path).config.train.steps > 0 for run in runs)
        for claim in CLAIMS:
            if claim.experiment == path.parent.name:
                assert {claim.group, claim.baseline} <= groups
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"**{part}.**" in readme for part in ("Claim", "Command", "Cost", "Outcome"))


def _done(name, nll, seed=0, **others):
    run = next(r for r in load_sweep(FOLDER / "mor_vs_baselines" / "sweep.py", "debug") if r.name == f"{name}-s{seed}")
    machine = {"device": "d", "versions": {"jax": "1"}, "python": "3", "command": "mor sweep"}
    costs = {"tokens": 1e6, "train_flops": 1e12, "serving_flops_per_token": 1e6, "seconds": 5.0, "machine": machine}
    return failed_result(run, "done", "") | {"nll": nll, "bits_per_byte": nll, **costs, **others}


def test_the_report_tells_agreement_from_disagreement_and_from_nothing():
    results = [_done("vanilla", 3.0, seed) for seed in (0, 1)] + [_done("vanilla", 3.002, 2)]
    results += [_done("expert-r2", 2.9 + seed / 1000, seed, topk_nll=2.8) for seed in (0, 1, 2)]
    results += [_done("expert-r3", 2.95, topk_nll=2.9)]
    results += [_done("recursive-r3", nll, seed) for seed, nll in ((0, 2.899), (1, 2.901))]
    table = CLAIM_TABLES.claims_table({"mor_vs_baselines": results})
    by_claim = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    decided = by_claim["MoR, N_r=2 against vanilla, equal FLOPs"]  # differences -0.1, -0.099, -0.1
    assert "| -0.0997 [-0.1011, -0.0982] | -0.2007 | 3 | yes |" in decided
    alone = by_claim["MoR, N_r=3 against vanilla, equal FLOPs"]
    assert "| -0.0500 | -0.1000 | 1 | undecided: one seed |" in alone
    opposed = by_claim["recursive, N_r=3 against vanilla, equal FLOPs"]
    assert "| -0.1000 [-0.1127, -0.0873] | -0.1000 | 2 | **no** |" in opposed
    assert "| +0.0510 |" in by_claim["MoR against recursive, N_r=3, equal FLOPs"]
    assert table.index("yes |") < table.index("**no** |") < table.index("one seed |") and "not run |" not in table
    assert table.startswith(f"1 agree, 1 do not, 2 are undecided, {len(CLAIMS) - 4} were not run here.")


def test_what_seeds_could_have_done_is_undecided():
    noisy = [_done("vanilla", 3.0 + 0.1 * seed, seed) for seed in (0, 1, 2)]
    shifts = (-0.05, 0.02, -0.03)  # paired: the same seeds move both by 0.1
    noisy += [_done("expert-r2", 3.0 + 0.1 * s + shifts[s], s, topk_nll=2.9) for s in (0, 1, 2)]
    table = CLAIM_TABLES.claims_table({"mor_vs_baselines": noisy})
    assert "| -0.0200 [-0.1096, +0.0696] | -0.2000 | 3 | undecided: the interval holds zero |" in table
    assert "spread by up to 0.1153 (standard deviation of 3 seeds, expert-r2)" in table
    elsewhere = {"mor_vs_baselines": [_done("vanilla", 3.0), _done("expert-r2", 2.95)], "recursions": noisy}
    assert CLAIM_TABLES.claims_table(elsewhere).startswith("0 agree, 0 do not, 1 are")  # seeds of another experiment


def test_claims_are_missing_only_if_no_scale_has_them():
    scale = {"mor_vs_baselines": [_done(name, 3.0) for name in ("vanilla", "expert-r2")]}
    assert "MoR, N_r=2 against vanilla, equal FLOPs" in CLAIM_TABLES.not_run([{}])
    assert "MoR, N_r=2 against vanilla, equal FLOPs" not in CLAIM_TABLES.not_run([{}, scale])


def test_a_table_of_runs_names_what_is_missing():
    runs = load_sweep(FOLDER / "mor_vs_baselines" / "sweep.py", "debug")
    missing = failed_result(next(r for r in runs if r.name == "token-r3-s0"), "not run", "")
    table = REPORT.runs_table([_done("vanilla", 3.0), missing])
    assert "| 3.0000 |" in table and table.endswith("\n\nNot run: token-r3.\n")
    assert REPORT.machines([missing]) == "not run\n" and "5 process seconds" in REPORT.machines([_done("vanilla", 3.0)])


def test_the_causal_loss_with_calibrated_boundaries_stands_beside():
    results = [_done("expert-r3", 3.2, seed, calibrated={"nll": 3.0 + seed, "gap": 0.0}) for seed in (0, 1, 2)]
    rows = TABLES.runs_table([*results, _done("vanilla", 3.1)]).splitlines()
    assert "| 3.2000 ± 0.0000 | 4.0000 ± 1.0000 | 3.2000" in rows[2] and "| 3.1000 |  | 3.1000 |" in rows[3]
    half = TABLES.runs_table([results[0], _done("expert-r3", 3.2, 1)])
    assert "| 3.2000 ± 0.0000 |  | 3.2000" in half  # a mean over other seeds would not compare
    point = FIGURES._calibrated(_done("expert-r3", 3.2, calibrated={"nll": 3.0, "tokens_per_depth": [0.0, 1.0, 0, 0]}))
    deeper = FIGURES._calibrated(_done("expert-r3", 3.2, calibrated={"nll": 3.0, "tokens_per_depth": [0.0, 0, 0, 1.0]}))
    assert (point["group"], point["nll"]) == ("expert-r3, calibrated", 3.0)
    assert point["serving_flops_per_token"] < deeper["serving_flops_per_token"]


def test_trained_models_are_named_with_their_scale(tmp_path):
    folder = tmp_path / "mor_vs_baselines" / "results"
    folder.mkdir(parents=True)
    tasks = {"step": 3, "mode": "threshold", "boundaries": [0.0, 1.0], "tasks": {"piqa": {"acc": 0.5, "samples": 4}}}
    (folder / "expert-r3-s0.large.tasks.json").write_text(json.dumps(tasks))
    table = REPORT._other_tables(tmp_path)
    heading = "### lm-eval: expert-r3-s0, scale `large` (step 3, selection threshold, calibrated boundaries)"
    assert table.startswith(heading) and "| piqa | 4 | 0.5 |" in table


def test_the_gap_is_told_by_recipe_with_and_without_calibration():
    routed = {"topk_nll": 3.0, "dead_token_ratio": 0.25, "tokens_per_depth": [0.0, 0.7, 0.3]}
    results = [
        _done("expert-r3", 3.2, gap=0.2, calibrated={"gap": -0.01}, threshold_accuracy=[1.0, 0.5], **routed),
        _done("expert-r2", 3.1, gap=0.1, calibrated={"gap": 0.02}, threshold_accuracy=[1.0, 0.9], **routed),
        _done("expert-r2", None, 1, topk_nll=2.9, calibrated={"gap": 0.03}),
        _done("vanilla", 3.0),
    ]
    rows = TABLES.router_table(results).splitlines()[2:]
    assert rows[0] == "| expert-r3-s0 | 3.0000 | 3.2000 | +0.2000 | -0.0100 | 1.000, 0.500 | 0.250 | 0.00, 0.70, 0.30 |"
    assert rows[2] == "| expert-r2-s1 | 2.9000 |  |  | +0.0300 |  |  |  |" and len(rows) == 3
    assert TABLES.gap_summary(results) == (
        "as trained +0.1000 to +0.2000 (2 runs); calibrated, expert-r3-s0 from +0.2000 to -0.0100, "
        "expert-r2-s0 from +0.1000 to +0.0200, the others are within 0.0300.\n"
    )
    assert TABLES.gap_summary(results[1:]) == ""


def test_losses_by_a_cap_on_the_passes_stand_in_columns():
    curve = [{"max_depth": 1, "nll": 3.5}, {"max_depth": 2, "nll": 3.25}]
    table = TABLES.depth_table([_done("expert-r2", 3.25, depth_curve=curve), _done("vanilla", 3.0)])
    assert table == "| run | 1 | 2 |\n|---|---|---|\n| expert-r2-s0 | 3.5000 | 3.2500 |\n"
    assert TABLES.depth_table([_done("vanilla", 3.0)]) == ""


def test_losses_by_source_are_causal_with_the_gap_beside():
    def text(topk, threshold):
        return {"text": {"sources": {n: {"topk_nll": topk, "threshold_nll": threshold} for n in ("wiki", "all")}}}

    results = [_done("expert-r3", 3.0, 0, **text(2.0, 2.1)), _done("expert-r3", 3.0, 1, **text(2.2, 2.5))]
    results += [_done("vanilla", 3.0, text={"sources": {"wiki": {"nll": 4.0}, "all": {"nll": 5.0}}})]
    rows = TABLES.source_table(results).splitlines()
    assert rows[0] == "| model | wiki | all | all, topk | gap | seeds |"
    assert rows[2:] == [
        "| expert-r3 | 2.3000 | 2.3000 | 2.1000 | +0.2000 | 2 |",
        "| vanilla | 4.0000 | 5.0000 |  |  | 1 |",
    ]
    assert TABLES.source_table([_done("vanilla", 3.0)]) == ""
    both = _done("expert-r3", 3.0, 0, **text(2.0, 2.4), calibrated=text(2.0, 2.1))
    assert TABLES.source_table([both]).splitlines()[2:] == [
        "| expert-r3 | 2.4000 | 2.4000 | 2.0000 | +0.4000 | 1 |",
        "| expert-r3, calibrated | 2.1000 | 2.1000 | 2.0000 | +0.1000 | 1 |",
    ]


def test_training_curves_are_means_over_seeds_by_tokens():
    short = {"tokens": 100.0, "steps": 10}
    results = [_done("vanilla", 3.0, seed, **short, curve=[[5, 4.0 + seed], [10, 3.0]]) for seed in (0, 2)]
    results += [_done("expert-r3", 3.0, tokens=200.0, steps=20, curve=[[5, 3.0], [20, 2.0]])]
    curves = FIGURES.training_curves(results)
    assert curves == {"vanilla": [(50.0, 5.0), (100.0, 3.0)], "expert-r3": [(50.0, 3.0), (200.0, 2.0)]}
    assert FIGURES.training_curves(results[2:]) == {}
    leads = FIGURES.training_leads(results)  # seed 0's only; the vanilla run decays from step 8 on
    assert leads == {"expert-r3": [(50.0, -1.0)]}


def test_ranked_runs_are_made_once_and_spread_under_every_name(tmp_path):
    ranked = RANKED.ranked_runs("debug", factor=2.0)
    assert [run.run.name for run in ranked[:3]] == ["vanilla-s0", "expert-r3-s0", "recursive-r3-s0"]
    keys = [RANKED.run_key(config_io.to_dict(run.run.config)) for run in ranked]
    assert len(set(keys)) == len(keys) and len({run.placed.name for run in ranked}) == len(ranked)
    assert ranked[0].run.config.train.steps == 20  # of 10
    moved = placed(ranked[0].placed, tmp_path).config
    moved = dataclasses.replace(moved, perf=dataclasses.replace(moved.perf, fusion="xla", scan_unroll=1))
    assert RANKED.run_key(config_io.to_dict(moved)) == keys[0]
    configs = [config_io.to_dict(run.run.config) for run in ranked[:2]]
    done = [{"state": "done", "config": config, "nll": 3.0, "experiment": "mor_vs_baselines"} for config in configs]
    written = RANKED.spread(done, "debug", 2.0, tmp_path)
    names = [path.parent.parent.name for path in written]
    assert "mor_vs_baselines" in names and "recursions" in names and "capacity" not in names
    rows = {row["name"]: row for row in json.loads((tmp_path / "recursions/results/debug.json").read_text())}
    assert rows["vanilla-s0"]["nll"] == 3.0 and rows["expert-r3-s0"]["state"] == "done"
    assert rows["expert-r4-s0"]["state"] == "not run" and "experiment" not in rows["vanilla-s0"]
    assert RANKED.spread(done, "debug", 1.0, tmp_path / "other") == []  # of another length


def test_at_scale_large_the_three_families_come_seed_by_seed():
    ranked = RANKED.ranked_runs("large")
    names = [run.placed.name for run in ranked]
    assert names[:4] == [
        "mor_vs_baselines.vanilla-s0",
        "mor_vs_baselines.expert-r3-s0",
        "closing_the_gap.plain-alpha-2-s0",
        "mor_vs_baselines.vanilla-s1",
    ]
    vanilla, paper, plain = (run.run.config for run in ranked[:3])
    assert paper.train.steps == plain.train.steps > vanilla.train.steps  # equal training FLOPs
    assert (plain.model.routing.residual, plain.model.routing.alpha) == ("plain", 2.0)
    assert 50e6 < count_parameters(vanilla.model).total < 60e6 and vanilla.model.head_dim == 64


@pytest.mark.slow
def test_ranked_runs_end_in_time_with_what_was_finished(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    script, results = FOLDER / "run_ranked.py", tmp_path / "ranked.json"
    options = ["--scale", "debug", "--seconds", "100", "--steps-factor", "0.5", "--processes", "1"]
    command = [sys.executable, str(script), *options, "--out", str(tmp_path / "runs"), "--results", str(results)]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - started < 150
    written = json.loads(results.read_text())
    states = [row["state"] for row in written["results"]]
    assert states[0] == "done" and set(states) <= {"done", "unfinished", "not run"} and "not run" in states
    first = written["results"][0]
    assert (first["name"], first["steps"], written["steps_factor"]) == ("vanilla-s0", 5, 0.5)
    assert [step for step, _ in first["curve"]] == [5] and "run_ranked.py" in first["machine"]["command"]

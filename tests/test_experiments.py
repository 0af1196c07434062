"""The sweeps of experiments/ build at every scale, claims name runs that exist, and the report says what was run."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mor_jax.sweep.execute import placed
from mor_jax.sweep.recipes import SCALES
from mor_jax.sweep.results import failed_result
from mor_jax.sweep.runs import load_sweep

FOLDER = Path(__file__).parent.parent / "experiments"
SWEEPS = sorted(FOLDER.glob("*/sweep.py"))


def _module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


CLAIMS = _module("claims").CLAIMS
REPORT = _module("report")


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
    results += [_done("expert-r3", 2.95, topk_nll=2.9), _done("recursive-r3", 2.9)]
    lines = REPORT.claims_table({"mor_vs_baselines": results}).splitlines()
    by_claim = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "| -0.0997 ± 0.0009 | -0.2007 | 3 / 3 | yes |" in by_claim["MoR, N_r=2 against vanilla, equal FLOPs"]
    assert "| -0.0507 | -0.1007 | 1 / 3 | **no** |" in by_claim["MoR, N_r=3 against vanilla, equal FLOPs"]
    assert "| +0.0500 |" in by_claim["MoR against recursive, N_r=3, equal FLOPs"]
    assert "| not run | not run |" in by_claim["token-choice against expert-choice, N_r=3"]
    noisy = [_done("vanilla", 3.0 + 0.1 * seed, seed) for seed in (0, 1, 2)]
    noisy += [_done("expert-r2", 2.98 + 0.1 * seed, seed, topk_nll=2.9) for seed in (0, 1, 2)]
    assert "within two standard errors" in REPORT.claims_table({"mor_vs_baselines": noisy}).splitlines()[2]


def test_a_table_of_runs_names_what_is_missing():
    runs = load_sweep(FOLDER / "mor_vs_baselines" / "sweep.py", "debug")
    missing = failed_result(next(r for r in runs if r.name == "token-r3-s0"), "not run", "")
    table = REPORT.runs_table([_done("vanilla", 3.0), missing])
    assert "| token-r3 |" in table and "| not run |" in table and "| 3.0000 |" in table
    assert REPORT.machines([missing]) == "not run\n" and "5 process seconds" in REPORT.machines([_done("vanilla", 3.0)])


def test_isoflop_points_are_read_by_budget():
    names = ["vanilla-d128-1e+15", "vanilla-d192-1e+15", "vanilla-d256-1e+15", "vanilla-d128-5e+14"]
    results = [
        {"name": name, "group": name, "non_embedding": 10 + i, "nll": 3.0 - i / 10} for i, name in enumerate(names)
    ]
    assert REPORT.isoflop_points(results) == {1e15: [(10, 3.0), (11, 2.9), (12, 2.8)]}

"""The comparison of experiments/isoflop: its models, the plan that unfolds, what is made of its results, its driver.

Losses are made up by a law with a known value of a pass; nothing is trained but by the slow test.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from mor_jax.errors import UserError
from mor_jax.model.flops import count_parameters, kv_bytes_per_token, run_flops
from mor_jax.sweep.results import failed_result, serving_flops_per_token

FOLDER = Path(__file__).parent.parent / "experiments" / "isoflop"
sys.path.insert(0, str(FOLDER))
CHOICES, FAMILIES, MODELS = (importlib.import_module(name) for name in ("choices", "families", "models"))
COMPARISON, ESTIMATE, COMPARE = (importlib.import_module(name) for name in ("comparison", "estimate", "compare"))
AGAIN = importlib.import_module("again")
OUTCOME, TABLES = (importlib.import_module(name) for name in ("outcome", "outcome_tables"))


def _result(run, loss):
    """A finished run as `compare.py` reports it; `report` and `val` are easier than `choose`."""
    model, name = run.config.model, "nll" if run.config.model.routing.kind == "none" else "threshold_nll"
    falling = (*model.capacities, 0.0)
    shares = None if name == "nll" else [0.0, *(here - next_ for here, next_ in itertools.pairwise(falling))]
    tokens = run.config.train.steps * run.config.train.batch_size * model.context_length
    texts = {text: {"sources": {s: {name: loss - x} for s in ("books", "all")}} for text, x in (("report", 0.2),)}
    return {
        **failed_result(run, "done", ""),
        "nll": loss,
        "tokens": tokens,
        "train_flops": run_flops(run.config),
        "serving_flops_per_token": serving_flops_per_token(model, model.capacities),
        "kv_bytes_per_token": kv_bytes_per_token(model),
        **({} if shares is None else {"tokens_per_depth": shares}),
        **texts,
    }


@pytest.fixture(scope="module")
def unfolded():
    comparison = COMPARISON.Comparison("full")
    _, ended = ESTIMATE.unfold(comparison, 6)
    rows = {run.name: _result(run, ESTIMATE.made_up_loss(run)) for _, _, run in ended}
    return comparison, ended, OUTCOME.Measured(comparison, rows)


def test_sizes_bracket_the_tokens_for_each_parameter_and_spend_the_budget():
    comparison, nothing = COMPARISON.Comparison("full"), {}
    for variant in FAMILIES.VARIANTS.values():
        for budget, widths in zip(comparison.budgets, variant.full_widths, strict=True):
            assert len(widths) == 5 and list(widths) == sorted(widths) and all(width % 32 == 0 for width in widths)
            each = []
            for width in widths:
                config = FAMILIES.configured("full", variant, width, budget, nothing, "data/isoflop")
                tokens = config.train.steps * config.train.batch_size * config.model.context_length
                assert tokens < 4 * 160e6  # epochs of the corpus
                assert run_flops(config) == pytest.approx(budget, rel=0.6 / config.train.steps), variant.name
                each.append(tokens / count_parameters(config.model).non_embedding)
            assert 5 < each[3] < each[1] < 62 and each[4] < 8 and each[0] > 40, (variant.name, budget, each)


def test_families_differ_in_what_they_say():
    def config(name):
        return FAMILIES.configured("full", FAMILIES.VARIANTS[name], 256, 4e15, {}, "data/isoflop")

    plain, mor, grown, recursive = map(config, ("vanilla-l4", "mor-r3", "grown-r3-0.5", "recursive-r3"))
    assert mor.model.unrolled_depth == recursive.model.unrolled_depth == 8 and plain.model.unrolled_depth == 4
    alike = dataclasses.replace(plain.model, parts=dataclasses.replace(plain.model.parts, value_residual=False))
    routers = count_parameters(mor.model).non_embedding - count_parameters(alike).non_embedding
    assert routers == 3 * 256  # vanilla-l4 is MoR's unique layers, each once
    assert recursive.model.routing.kind == "none" and grown.model == mor.model
    assert [stage.share for stage in grown.train.growth] == [0.5] and grown.train.steps > mor.train.steps
    for family in ("vanilla", "mor"):
        assert MODELS.RECIPE[family]["optimizer.kind"] == "muon"
    assert mor.model.parts.qk_norm and recursive.model.parts.qk_norm and not mor.model.parts.value_residual
    assert mor.model.routing.capacities == (1.0, 0.25, 0.125) and config("mor-r2").model.routing.capacities == (
        1.0,
        0.25,
    )


def test_vanilla_gets_as_many_tries_as_mor():
    def count(family):
        return len(FAMILIES.variants_of(family))

    assert count("vanilla") == count("mor") + count("grown")
    tries = [FAMILIES.tries_of(FAMILIES.VARIANTS[name], 256) for name in ("vanilla-l8", "mor-r2", "grown-r3-0.7")]
    assert len({len(each) for each in tries}) == 1
    for name, each in zip(("vanilla-l8", "mor-r2", "grown-r3-0.7"), tries, strict=True):
        for what in each:  # they build, and spend the budget
            config = FAMILIES.configured("full", FAMILIES.VARIANTS[name], 256, 4e15, what.changes, "data/isoflop")
            assert run_flops(config) == pytest.approx(4e15, rel=1e-3)


def test_the_plan_unfolds_by_rank_and_keeps_what_it_asked_for(unfolded):
    comparison, ended, _ = unfolded
    assert {run.name for run in comparison.plan({})} == {run.name for run in comparison.stages({})["rates"]}
    asked, results = set(), {}
    for count, (_, _, run) in enumerate(ended):
        results[run.name] = ESTIMATE.made_up_result(run, ESTIMATE.made_up_loss(run))
        if count % 12 == 0:
            now = {run.name for run in comparison.plan(results)}
            assert asked <= now  # no choice is taken back while runs end
            asked = now
    stages = comparison.stages(results)
    assert [name for name, runs in stages.items() if not runs] == ["tries"]  # the made-up MoR wins
    assert {run.name for run in comparison.plan(results)} == results.keys()
    seeds = stages["seeds of vanilla and MoR"]
    assert [run.config.train.seed for run in seeds] == [s for s in range(6) for _ in range(2)]
    assert all(run.config.data.seed == run.config.train.seed for run in seeds)
    assert len({run.group for run in seeds}) == 2 and len(stages["confirmation"]) == 15
    assert ended[-1][0] / 60 < 90  # minutes of two H200s


def test_choices_are_those_of_the_losses(unfolded):
    comparison, _, measured = unfolded
    results = measured.results
    for family in FAMILIES.FAMILIES:
        rates, rate = comparison.swept(results, family)
        assert min(rates, key=ESTIMATE.made_up_loss).config.optimizer.learning_rate == rate == 8e-3
        assert comparison.rate(results, family, 1) == pytest.approx(8e-3 * 4**-0.125, rel=1e-3)
        assert comparison.rate(results, family, 2) == pytest.approx(8e-3 * 16**-0.125, rel=2e-3)
        sizes = comparison.sizes(results, family, 2)
        assert comparison.at_best(results, family)[0] == min(sizes, key=ESTIMATE.made_up_loss)
        tried = [comparison.some_sizes(results, each, 0, (1, 2, 3)) for each in comparison.tried(results, family)]
        best = min(tried, key=lambda runs: min(map(ESTIMATE.made_up_loss, runs)))
        assert best[0].name.startswith(comparison.variant(results, family).name)


def test_a_rate_at_the_edge_is_followed_and_one_that_diverges_is_not_taken():
    comparison, results = COMPARISON.Comparison("full"), {}

    def loss(rate):
        return 3.0 + abs(math.log2(rate / 32e-3)) / 100

    while (step := comparison.swept(results, "mor"))[1] is None:
        for run in step[0]:
            results[run.name] = {"state": "done", "nll": loss(run.config.optimizer.learning_rate)}
    assert step[1] == 32e-3 and [r.config.optimizer.learning_rate for r in step[0]][3:] == [32e-3, 64e-3]
    results[step[0][3].name] = {"state": "diverged"}
    assert comparison.swept(results, "mor")[1] == 16e-3


def test_tries_come_where_mor_does_not_win(unfolded):
    comparison, _, measured = unfolded
    leader = comparison.leader(measured.results)
    worse = {run.name: 3.5 for run in comparison.at_best(measured.results, leader, CHOICES.SEEDS)}
    results = {
        name: result | ({"nll": worse[name]} if name in worse and not name.endswith("s0") else {})
        for name, result in measured.results.items()
    }
    assert not comparison.mor_wins(results)
    first = comparison.stages(results)["tries"]
    budgets = [comparison.budgets[1]] * 10
    assert [run_flops(run.config) for run in first] == pytest.approx(budgets, rel=1e-3)
    for run in first:
        results.setdefault(run.name, _result(run, 2.0 if "untied" in run.name else 4.0))
    later = comparison.stages(results)["tries"][10:]
    assert len(later) == 3 and all("untied" in run.name for run in later)  # MoR's are worse than none
    del results[comparison.at_best(results, "vanilla", (5,))[0].name]
    assert comparison.stages(results)["tries"] == []


def test_the_outcome_finds_what_the_losses_were_made_of(unfolded, tmp_path):
    comparison, _, measured = unfolded
    assert measured.law(samples=5).law.phi == pytest.approx(0.5, abs=0.01)
    text = TABLES.tables(measured)
    leader = comparison.leader(measured.results)
    lead = comparison.lead(measured.results, "report")
    assert lead.seeds == 6 and f"| {leader} less vanilla | {lead} (6 seeds) |" in text
    assert "| 9 | confirmation | 15 of 15 |  |" in text and "None: MoR beats vanilla." in text
    assert "phi = 0.5" in text and "beside 0.46 for plain looping" in text and "| report: books |" in text
    for family in ("vanilla", leader):
        fit, refused = measured.isoflop(family)
        assert not refused and fit.losses.exponent < 0 < fit.path.exponent
    written = OUTCOME.figures(measured, tmp_path)
    assert len(written) == 2 * (len(measured.fits()) + 2) and all(path.stat().st_size > 1000 for path in written)
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"scale": "full", "results": list(measured.results.values())}))
    screen = OUTCOME.first_screen(tmp_path)
    assert f"| training FLOPs, 1.6e+16 each | 1.6e+16 | 1.6e+16 | {lead} (6 seeds) |" in screen
    assert all(f"| {cost} |" in screen for cost in ("parameters", "serving FLOPs per token", "KV bytes per token"))
    assert "Vanilla needs " in screen


def test_what_was_not_run_says_so(unfolded, tmp_path):
    comparison, ended, measured = unfolded
    names = {run.name for _, _, run in ended[:50]}
    part = {name: result for name, result in measured.results.items() if name in names}
    rest = [run for run in comparison.plan(part) if run.name not in part]
    part[rest[0].name] = failed_result(rest[0], "unfinished", "at step 100")
    half = OUTCOME.Measured(comparison, part)
    text = TABLES.tables(half)
    assert "| 9 | confirmation | 0 of " in text or "| 9 | confirmation | 0 of 0 | not decided on yet |" in text
    assert "1 unfinished" in text and f"Not finished, by rank: {rest[0].name}" in text
    assert "| grown less vanilla | not run | not run |" in text
    empty = OUTCOME.Measured(comparison, {})
    assert "Not fitted: runs at one budget do not tell" in TABLES.tables(empty)
    assert OUTCOME.figures(empty, tmp_path) == []
    assert OUTCOME.first_screen(tmp_path) == OUTCOME._NOT_MEASURED
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"scale": "full", "results": list(part.values())}))
    _, behind = TABLES.at_budget(half, 0)
    best = min(less for group, less in behind.items() if group.startswith(("mor", "grown")))
    says = f"the better MoR is {abs(best):.3f} nats {'behind' if best > 0 else 'ahead of'} vanilla"
    screen = OUTCOME.first_screen(tmp_path)
    assert says in screen and "is not run" in screen and "moved by" not in screen
    name = "vanilla-l8-d160-1e15-lr0.008-s0"
    moved = {half: {"before": 3.8, "now": 3.79} for half in ("choose", "report")}
    unknown = {half: {"before": 3.8, "now": None} for half in ("choose", "report")}
    (tmp_path / "again.json").write_text(json.dumps({"moved": {name: moved, "mor-r2": unknown}}))
    assert "vanilla's best there moved by -0.0100." in OUTCOME.first_screen(tmp_path)
    text = TABLES.tables(half, OUTCOME.load_moved(tmp_path))
    assert f"| {name} | 3.8000 | 3.7900 | 3.8000 | 3.7900 |" in text and "| mor-r2 | 3.8000 | not run |" in text
    assert {group.split("-")[0] for group in behind} == {"vanilla", "mor", "grown", "recursive"}


def test_a_run_starts_only_if_it_can_end_in_time_from_where_it_stands(unfolded, tmp_path):
    _, ended, _ = unfolded
    run = ended[-1][2]
    seconds = ESTIMATE.seconds_of(run.config, run.name, processes=7)
    assert seconds > ESTIMATE.seconds_of(run.config, run.name)  # fewer share the card
    plan = {"end": 10_000.0, "more_calls": False, "processes": 7}
    assert COMPARE._last_start(tmp_path, plan, run) == pytest.approx(10_000 - seconds)
    (tmp_path / run.name).mkdir()
    line = {"step": run.config.train.steps // 2, "loss": 3.0}
    (tmp_path / run.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert COMPARE._last_start(tmp_path, plan, run) == pytest.approx(10_000 - seconds / 2, abs=1)
    assert COMPARE._last_start(tmp_path, {**plan, "more_calls": True}, run) == 10_000 - COMPARE._LEAST_SECONDS


def test_what_is_run_again_is_the_best_of_every_family(unfolded):
    comparison, _, measured = unfolded
    runs = AGAIN.best_runs(comparison, measured.results)
    assert [run.name.split("-")[0] for run in runs] == list(FAMILIES.FAMILIES)
    for run in runs:
        alike = [r for n, r in measured.results.items() if n.startswith(run.name.split("-d")[0]) and "1e15" in n]
        assert measured.results[run.name]["nll"] == min(row["nll"] for row in alike)
    assert AGAIN.best_runs(comparison, {}) == []


def test_results_of_another_corpus_are_not_gone_on_from(tmp_path, monkeypatch):
    earlier = tmp_path / "earlier.json"
    options = COMPARE.Arguments(out=tmp_path / "runs", earlier=earlier)
    monkeypatch.setattr(COMPARE.launch, "read_manifest", lambda folder: SimpleNamespace(hash="abc"))
    for corpus, refused in (({"corpus": "abc"}, False), ({}, True), ({"corpus": "other"}, True)):
        row = {"name": "a", "state": "done"}
        earlier.write_text(json.dumps({"scale": "full", "results": [row], **corpus}))
        with (
            pytest.raises(UserError, match=f"is of the corpus {corpus.get('corpus')}, but")
            if refused
            else nullcontext()
        ):
            COMPARE.launch.prepare(options)
    assert (tmp_path / "runs" / "a" / "result.json").exists()
    assert COMPARE.launch.corpus_hash(COMPARE.Arguments(scale="debug")) is None


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was_stopped(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    results, text = tmp_path / "comparison.json", tmp_path / "report.jsonl"
    lines = [{"id": f"usgov/{n}", "source": "usgov", "text": f"page {n} of many " * 9} for n in range(20)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--scale", "debug", "--seconds", "150", "--processes", "1", "--report", str(text), "--more-calls"]
    command = [sys.executable, str(FOLDER / "compare.py"), *options]
    command += ["--out", str(tmp_path / "runs"), "--results", str(results)]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if ": done" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    rows = json.loads(results.read_text())["results"]
    assert rows[0]["state"] == "done" and rows[0]["stage"] == "rates" and rows[0]["report"]["sources"]["all"]["nll"] > 0
    assert rows[0]["machine"]["command"].startswith("python experiments/isoflop/compare.py --scale debug")
    elsewhere = [*command[:-4], "--out", str(tmp_path / "more"), "--results", str(results), "--earlier", str(results)]
    done = subprocess.run(elsewhere, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(results.read_text())["results"]
    finished = [row for row in again if row["state"] == "done"]
    assert len(finished) > 1 and again[0]["nll"] == rows[0]["nll"]
    assert {row["state"] for row in again} > {"done"}
    assert "| 1 | rates |" in TABLES.tables(OUTCOME.load(results))

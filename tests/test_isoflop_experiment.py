"""The ablation of experiments/isoflop: its corpus, its models, what its stages choose, and its driver on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment_script import load_script
from mor_jax.model.flops import count_parameters, run_flops
from mor_jax.sweep.paired import PairedDifference

FOLDER = Path(__file__).parent.parent / "experiments" / "isoflop"


CORPUS = load_script("isoflop/corpus")
MODELS = load_script("isoflop/models")
ABLATION = load_script("isoflop/ablation")
TABLE = load_script("isoflop/table")


def _documents(source: str, count: int, parts: int):
    forms = {"books": "books/A/Book {0}#{1}", "openstax": "openstax/book-{0}@1/m{1}"}
    form = forms.get(source, f"{source}/{{0}}-{{1}}")
    for work in range(count):
        for part in range(parts):
            yield {"id": form.format(work, part), "source": source, "text": f"{source} {work} {part}"}


def test_no_part_of_a_held_out_work_is_trained_on(tmp_path):
    documents = [*_documents("books", 600, 12), *_documents("openstax", 40, 50), *_documents("usgov", 400, 1)]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, half in zip(paths, (documents[::2], documents[1::2]), strict=True):
        path.write_text("".join(json.dumps(document) + "\n" for document in half))
    arguments = [str(path) for path in paths]
    script = [sys.executable, str(FOLDER / "corpus.py")]
    for inputs, out in ((arguments, "a"), (arguments[::-1], "b"), (arguments[:1], "c")):
        subprocess.run([*script, *inputs, "--out", str(tmp_path / out)], check=True, capture_output=True)

    def read(out, name):
        lines = (tmp_path / out / name).read_text().splitlines()
        return {json.loads(line)["id"]: json.loads(line) for line in lines}

    halves = {name: read("a", f"{name}.jsonl") for name in ("choose", "report")}
    trained = {**read("a", "train/one.jsonl"), **read("a", "train/two.jsonl")}
    works = {name: {CORPUS.work_of(d) for d in found.values()} for name, found in (*halves.items(), ("train", trained))}
    assert not works["train"] & (works["choose"] | works["report"]) and not works["choose"] & works["report"]
    for found in works.values():
        assert {work.split("/")[0] for work in found} == {"books", "openstax", "usgov"}
    assert "books/A/Book 0" in works["train"] and "openstax/book-0@1" in works["train"]
    assert len(trained) + sum(map(len, halves.values())) < len(documents)  # pages that are neither
    for name, found in halves.items():
        assert read("b", f"{name}.jsonl") == found  # whatever the order
        alone = read("c", f"{name}.jsonl")
        assert alone == {key: value for key, value in found.items() if key in alone}  # and whatever is added


@pytest.mark.parametrize("scale", ["full", "debug"])
def test_every_run_spends_the_budget(scale):
    ablation = ABLATION.Ablation(scale)
    for part, family in (*ablation.tested(), *((ABLATION.BASE, family) for family in MODELS.FAMILIES)):
        run = ablation.at_best({}, family, part, 1)
        assert (run.config.train.seed, run.config.data.seed) == (1, 1)
        assert not run.config.model.attend_across_documents
        spent, budget = run_flops(run.config), MODELS.SCALES[scale].budget
        assert spent == pytest.approx(budget, rel=0.6 / run.config.train.steps), run.name


def test_sizes_bracket_the_tokens_for_each_parameter():
    for run in ABLATION.Ablation("full").sizes({}):
        config = run.config
        tokens = config.train.steps * config.train.batch_size * config.model.context_length
        assert 4.5 < tokens / count_parameters(config.model).non_embedding < 60, run.name
        assert tokens < 4 * 160e6  # epochs of the corpus


def test_stages_choose_by_what_was_found():
    ablation = ABLATION.Ablation("debug")
    sizes = ablation.sizes({})
    assert sizes[0].name == "vanilla-d24-lr0.003-base-s0" and len({run.name for run in sizes}) == len(sizes) == 16
    found = {run.name: {"state": "done", "nll": 5.0} for run in sizes}
    found["vanilla-d24-lr0.003-base-s0"]["nll"] = 4.9
    found["mor-d32-lr0.003-base-s0"]["nll"] = 4.9
    found["mor-d24-lr0.006-base-s0"]["nll"] = 4.8
    found["mor-d24-lr0.006-adamw-s0"]["nll"] = 4.7
    qk, adamw, growth = (ABLATION._BY_NAME[name] for name in ("qk-norm", "adamw", "growth-0.5"))
    assert ablation.at_best(found, "mor", qk, 2).name == "mor-d32-lr0.006-qk-norm-s2"  # best width, best rate
    assert ablation.at_best(found, "mor", adamw, 0).name == "mor-d32-lr0.006-adamw-s0"
    assert ablation.at_best(found, "vanilla", qk, 0).name == "vanilla-d24-lr0.003-qk-norm-s0"
    screened = ablation.screen(found)
    assert [run.name for run in screened[:2]] == ["vanilla-d24-lr0.003-base-s0", "mor-d32-lr0.006-base-s0"]
    assert len(screened) == 6 + len(list(ablation.tested()))

    def put(part, seed, loss):
        found[ablation.at_best(found, "mor", part, seed).name] = {"state": "done", "nll": loss}

    for seed in range(6):
        put(ABLATION.BASE, seed, 4.5 + 0.1 * seed)
    put(qk, 0, 4.48)
    put(growth, 0, 4.51)  # worse than the base: no more seeds
    put(adamw, 0, 4.6)  # worse than the base, which has what is tested
    for rate in ("0.003", "0.006"):
        found[f"vanilla-d24-lr{rate}-adamw-s0"]["nll"] = 4.0
    assert [run.name for run in ablation.confirm(found)] == [
        "mor-d32-lr0.006-adamw-s1",
        "mor-d32-lr0.006-adamw-s2",
        "mor-d32-lr0.006-qk-norm-s1",
        "mor-d32-lr0.006-qk-norm-s2",
    ]
    put(ABLATION._BY_NAME["lora-8"], 0, 4.495)  # too small a gain to go before fresh seeds
    assert [run.name for run in ablation.confirm(found, 0.01)] == [run.name for run in ablation.confirm(found)[:-2]]
    assert ablation.repeat(found) == []
    for seed, gain in ((1, 0.022), (2, 0.019)):
        put(qk, seed, 4.5 + 0.1 * seed - gain)
    fresh = [f"mor-d32-lr0.006-{name}-s{seed}" for name in ("base", "qk-norm") for seed in (3, 4, 5)]
    assert [run.name for run in ablation.repeat(found)] == fresh
    names = list(dict.fromkeys(run.name for run in ablation.decided(found)))
    first, repeated, rest = (
        names.index(name) for name in (f"mor-d32-lr0.006-{of}" for of in ("qk-norm-s2", "qk-norm-s5", "lora-8-s2"))
    )
    assert first < repeated < rest
    table = TABLE.table(ablation, found | {name: found[name] | {"tokens": 1e6, "non_embedding": 1e5} for name in found})
    rows = {line.split(" | ")[0] + line.split(" | ")[1]: line for line in table.splitlines() if line.startswith("| ")}
    assert rows["| QK-normmor"].endswith("| -0.0203 [-0.0241, -0.0165] (3 seeds) |  |  | undecided: not repeated |")
    assert rows["| growth: one pass for half of the steps, then routedmor"].endswith(
        "| +0.0100 (1 seed) |  |  | does not pay: seed 0 alone speaks against it |"
    )
    assert rows["| QK-normvanilla"].endswith("|  |  |  | not run |")
    assert "| mor-d32-lr0.003-base-s0 | 0.10M | 10.0 | 4.9000 |  |" in table and "| 4.5000 | taken |" not in table


def test_verdicts():
    def effect(mean, half_width, seeds=3):
        return PairedDifference(mean, half_width, seeds)

    sure, unsure, small = effect(-0.02, 0.01), effect(-0.02, 0.03), effect(-0.009, 0.001)
    assert ABLATION.verdict(None, None) == "not run"
    assert ABLATION.verdict(effect(-0.02, None, 1), None) == "undecided: 1 of 3 seeds"
    assert ABLATION.verdict(unsure, None) == "undecided: the interval holds zero"
    assert ABLATION.verdict(small, None) == "does not pay: less than 0.01"
    assert ABLATION.verdict(sure, effect(-0.02, 0.01, 2)) == "undecided: not repeated"
    assert ABLATION.verdict(sure, unsure) == "does not pay: fresh seeds do not repeat it"
    assert ABLATION.verdict(sure, sure) == "**pays**"
    assert ABLATION.verdict(sure, None, False) == "**pays**"
    assert ABLATION.verdict(small, None, False) == "does not pay: less than 0.01"


@pytest.mark.slow
def test_the_driver_goes_on_where_it_was_stopped(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    results, text = tmp_path / "ablation.json", tmp_path / "report.jsonl"
    text.write_text("".join(json.dumps(d | {"text": d["text"] * 9}) + "\n" for d in _documents("usgov", 20, 1)))
    options = ["--scale", "debug", "--seconds", "120", "--processes", "1", "--flops-per-second", "1e9"]
    command = [sys.executable, str(FOLDER / "run.py"), *options, "--report", str(text)]
    command += ["--out", str(tmp_path / "runs"), "--results", str(results)]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if ": done" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    rows = json.loads(results.read_text())["results"]
    assert rows[0]["state"] == "done" and rows[0]["report"]["sources"]["all"]["nll"] > 0
    assert "isoflop/run.py" in rows[0]["machine"]["command"]
    written = (tmp_path / "runs" / rows[0]["name"] / "result.json").stat().st_mtime_ns
    elsewhere = [*command[:-4], "--out", str(tmp_path / "more"), "--results", str(results), "--earlier", str(results)]
    started = time.monotonic()
    done = subprocess.run(elsewhere, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - started < 150
    again = json.loads(results.read_text())["results"]
    finished = [row["name"] for row in again if row["state"] == "done"]
    assert len(finished) > 1 and again[0]["nll"] == rows[0]["nll"]
    assert written == (tmp_path / "runs" / rows[0]["name"] / "result.json").stat().st_mtime_ns
    table = TABLE.table(ABLATION.Ablation("debug"), {row["name"]: row for row in again})
    assert "not run |" in table

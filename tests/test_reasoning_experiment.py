"""The questions of experiments/reasoning against plain counting, its models' sizes, and its measurements."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiment_script import load_script
from mor_jax.config import DataConfig
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.flops import count_parameters, run_flops, train_flops_per_token
from mor_jax.model.parameters import Weights
from mor_jax.runs.state import init_train_state

FOLDER = Path(__file__).parent.parent / "experiments" / "reasoning"


_NAMES = ("tasks", "rows", "drawn", "reasoners", "ranking", "answers", "tables", "figures")
TASKS, ROWS, DRAWN, FAMILIES, RANKING, ANSWERS, TABLES, FIGURES = (load_script(f"reasoning/{name}") for name in _NAMES)
NAMES = ("pointer-8", "s3-32", "s5-32", "addition-20")


def _rows(name, seed=0, rows=200, held_out=False):
    """Rows as lists of (word, answer, difficulty); no answer where the difficulty is 0."""
    task = TASKS.task_of(name)
    for row in zip(*task.rows(np.random.default_rng(seed), rows, held_out), strict=True):
        assert {len(part) for part in row} == {task.row_length}
        tokens, answers, reads = row
        told = [TASKS.WORDS[answer] if read else None for answer, read in zip(answers, reads, strict=True)]
        yield list(zip((TASKS.WORDS[token] for token in tokens), told, reads, strict=True))


def _questions(row):
    """The parts of a row of words that a mark begins."""
    starts = [place for place, (word, _, _) in enumerate(row) if word == "?"]
    assert starts[0] == 0
    for start, end in itertools.pairwise([*starts, len(row)]):
        assert row[start][1] is None
        yield row[start + 1 : end]


def test_pointers_are_followed():
    seen = set()
    for row in _rows("pointer-8"):
        words, answers, reads = zip(*row, strict=True)
        edges = dict(word.split(">") for word in words[:16])
        assert len(edges) == 16 and not any(reads[:16])
        for asked, answer, read in zip(words[16:], answers[16:], reads[16:], strict=True):
            node, hops = asked.split("+")
            for _ in range(int(hops)):
                node = edges[node]
            assert answer == node and read == int(hops)
            seen.add(read)
    assert seen == set(range(1, 9))


@pytest.mark.parametrize(("name", "degree"), [("s3-32", 3), ("s5-32", 5)])
def test_words_are_composed(name, degree):
    elements = sorted(itertools.permutations(range(degree)))
    lengths = set()
    for row in _rows(name):
        for question in _questions(row):
            places = tuple(range(degree))
            for count, (element, answer, read) in enumerate(question, 1):
                places = tuple(elements[int(element[1:])][place] for place in places)
                assert answer == f"e{elements.index(places)}" and read == count
            lengths.add(len(question))
    assert lengths - {0} == set(range(1, 33))


def test_sums_are_right_and_their_digits_need_the_pairs_that_they_are_said_to_need():
    """A digit stays what it is whatever stands before the pairs that it needs, and not if one pair less were enough."""
    chains = set()
    for row in _rows("addition-20", rows=60):
        pairs = list(zip(row[::2], row[1::2], strict=True))
        marks = [place for place, pair in enumerate(pairs) if pair[0][0] == "?"]
        for start, end in itertools.pairwise([*marks, len(pairs)]):
            numbers = [[int(side[0]) for side in pair] for pair in pairs[start + 1 : end]]
            for place, ((_, none, _), (_, answer, read)) in enumerate(pairs[start + 1 : end]):
                assert none is None and answer == _digit(numbers[: place + 1]) and 1 <= read <= place + 1
                needed = numbers[place + 1 - read : place + 1]
                before = [[[0, 0]], [[9, 9]]] if read <= place else [[]]
                assert {_digit(pairs + needed) for pairs in before} == {answer}
                fewer = {_digit(pairs + needed[1:]) for pairs in ([[0, 0]], [[9, 9]])}
                assert read == 1 or len(fewer) == 2
                chains.add(read)
    assert {1, 2, 3, 5, 8} <= chains and max(chains) > 12


def _digit(pairs):
    first, second = (int("".join(str(pair[side]) for pair in reversed(pairs))) for side in (0, 1))
    return str(first + second)[-len(pairs) :][0] if len(str(first + second)) >= len(pairs) else "0"


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_row_is_trained_on(name):
    def contents(**options):
        for row in _rows(name, **options):
            words = [word for word, _, _ in row]
            yield tuple(sorted(words[:16])) if "pointer" in name else tuple(words)

    trained = {content for seed in range(3) for content in contents(seed=seed, rows=500)}
    held_out = set(contents(seed=9, held_out=True))
    assert not trained & held_out and len(held_out) > 100


def test_batches_are_a_function_of_their_number():
    options = {"context_length": 64, "vocab_size": 544, "batch_size": 4}
    dataset = ROWS.make_dataset(DataConfig(source="reasoning:pointer-8", seed=3), **options)
    first = [next(dataset) for _ in range(3)]
    dataset.step = 1
    np.testing.assert_equal(next(dataset), first[1])
    some = ROWS.make_dataset(DataConfig(source="reasoning:pointer-8", seed=3), **options, rows=[1, 3])
    np.testing.assert_equal(some.batch(2), {name: array[[1, 3]] for name, array in first[2].items()})
    assert {array.shape for array in first[0].values()} == {(4, 65)}
    assert (first[0]["tokens"] != first[1]["tokens"]).any()
    tokenizer = dataset.tokenizer
    text = "? 3 n4 e5 n10>n3 n10+2"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == len(TASKS.WORDS)
    with pytest.raises(UserError, match=r"data.source='reasoning:maze-3': 'maze-3' is not KIND-LARGEST"):
        ROWS.make_dataset(DataConfig(source="reasoning:maze-3"), **options)
    with pytest.raises(UserError, match=r"model.context_length=64 must be 96 for 'reasoning:addition-40'"):
        ROWS.make_dataset(DataConfig(source="reasoning:addition-40"), **options)


def test_answers_are_labels_where_they_are_asked():
    dataset = ROWS.make_dataset(DataConfig(source="reasoning:s3-4"), context_length=8, vocab_size=544, batch_size=4)
    batch = dataset.batch(0)
    asked_BT = batch["difficulty"][:, 1:] > 0
    np.testing.assert_array_equal(asked_BT, batch["labels"][:, 1:] != -100)
    np.testing.assert_array_equal(asked_BT, batch["tokens"][:, :-1] != TASKS.ID["?"])
    assert (batch["labels"][:, 0] == -100).all()


def test_families_have_equal_parameters_or_equal_flops():
    scale = FAMILIES.scale_of("full")
    runs = RANKING.ranked_runs("full")
    assert len({run.name for run in runs}) == len(runs) and runs[0].name == "pointer-8-shallow-s0"
    for task in scale.widths:
        model = {family: FAMILIES.configured(scale, task, family, 4) for family in FAMILIES.FAMILIES}
        counts = {family: count_parameters(config.model).non_embedding for family, config in model.items()}
        assert counts["shallow"] == counts["recursive"] == counts["drawn"] < counts["expert"] < 1.01 * counts["shallow"]
        assert counts["deep"] > 2 * counts["shallow"]
        cost = {family: train_flops_per_token(config.model) for family, config in model.items()}
        assert cost["recursive"] == cost["deep"] > cost["expert"] > cost["shallow"]
        assert len({config.train.steps for config in model.values()}) == 1
        for family in ("shallow", "expert", "grown"):
            config = FAMILIES.configured(scale, task, family, 4, equal_flops=True)
            assert run_flops(config) == pytest.approx(run_flops(model["deep"]), rel=1e-3)
        config = FAMILIES.configured(scale, task, "drawn", 4, equal_flops=True)  # its draws are not known beforehand
        assert DRAWN.drawn_flops(config) == pytest.approx(run_flops(model["deep"]), rel=0.03)


def test_drawn_passes_go_on_where_they_were():
    programs = [lambda state, batch, n=n: (dataclasses.replace(state, step=state.step + 1), n) for n in (1, 2, 3)]

    @dataclasses.dataclass
    class State:
        step: int

    def passes(start, count):
        step, state, found = DRAWN._Drawn(programs, seed=5), State(start), []
        for _ in range(count):
            state, metrics = step(state, {})
            found.append(metrics)
        return found

    straight = passes(0, 40)
    assert set(straight) == {1, 2, 3} and passes(25, 15) == straight[25:]


def test_correlation_is_that_of_scipy_and_its_interval_holds_it():
    generator = np.random.default_rng(0)
    difficulty_X = generator.integers(1, 9, 600)
    passes_X = np.clip(difficulty_X // 3 + generator.integers(0, 3, 600), 1, 4)
    answers = ANSWERS.Answers(np.repeat(np.arange(300), 2), difficulty_X, np.ones(600, bool), passes_X)
    found, low, high = ANSWERS.rank_correlation(passes_X, answers)
    from scipy.stats import spearmanr

    assert found == pytest.approx(spearmanr(passes_X, difficulty_X)[0]) and low < found < high < low + 0.2
    report = ANSWERS.routing_report(answers)["correlation"]
    assert report["knowing"][0] > found > report["random"][2] and report["random"][1] < 0 < report["random"][2]
    assert ANSWERS.rank_correlation(np.ones(600), answers) is None


def test_passes_beyond_training_are_the_unrolled_model():
    """Without a router: two passes of an untrained model are its own answers, and four those of a model made so."""
    scale = FAMILIES.scale_of("debug")
    config = FAMILIES.configured(scale, "pointer-2", "recursive", 2)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = Weights(config.model, init_train_state(config, mesh).params)
    batches = ANSWERS.held_out_batches(config, 8)
    longer = ANSWERS.with_passes(weights, 4)
    made = FAMILIES.configured(scale, "pointer-2", "recursive", 4).model
    assert (longer.config.num_layers, longer.config.unrolled_depth) == (made.num_layers, made.unrolled_depth) == (4, 4)
    same, own = (ANSWERS.answers_of(w, config.perf, batches) for w in (ANSWERS.with_passes(weights, 2), weights))
    np.testing.assert_array_equal(same.correct_X, own.correct_X)
    assert own.passes_X is None and len(own.row_X) == 96 and set(own.difficulty_X) == {1, 2}
    np.testing.assert_array_equal(own.row_X, np.repeat(np.arange(8), 12))


@pytest.mark.slow
def test_the_comparison_runs_and_is_shown(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    results = tmp_path / "reasoning.json"
    options = ["--scale", "debug", "--seconds", "200", "--processes", "2", "--run-seconds", "20"]
    command = [sys.executable, str(FOLDER / "run.py"), *options, "--out", str(tmp_path / "runs")]
    command += ["--results", str(results)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(results.read_text())
    finished = [row["name"] for row in values["results"] if row["state"] == "done"]
    assert len(finished) >= 7 and finished[0] == "pointer-2-shallow-s0"
    by_name = {row["name"]: row for row in values["results"]}
    drawn, expert = by_name["pointer-2-drawn-r2-s0"], by_name["pointer-2-expert-r2-s0"]
    assert drawn["by_passes"].keys() == {"1", "2", "3", "4"} and expert["by_passes"].keys() == {"1", "2"}
    assert drawn["by_passes"]["2"] == drawn["accuracy"] and expert["by_passes"]["2"] == expert["accuracy"]
    assert sum(expert["easy_and_hard"]["rows"].values()) == pytest.approx(1)
    table = TABLES.tables("debug", by_name)
    assert "| harder answers take more passes (expert) | pointer-2 |" in table and "open: " in table
    figure = FIGURES.draw(by_name, "pointer-2", 2)
    assert figure is not None and len(figure.axes) == 3

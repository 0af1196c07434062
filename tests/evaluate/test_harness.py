"""lm-eval over local evaluation sets, with a model whose likelihoods are known, and batch invariance of a real one."""

import gzip
import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import config, weights

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.evaluate.scoring import Scorer, TokenScores
from mor_jax.evaluate.tasks.local import PAPER_TASKS, TASKS, local_task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that lm-eval imports
    pytest.importorskip("lm_eval")
    from mor_jax.evaluate import harness

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets'
CHOICES = ["cccc", "aaa", "bb", "bbbb"]
SETS = {
    "lambada_openai.jsonl.gz": [{"context": "x", "continuation": "aa"}, {"context": "y", "continuation": "ab"}],
    "hellaswag_val.jsonl.gz": [{"query": "q", "choices": CHOICES, "gold": gold} for gold in (2, 3)],
    "piqa_valid.jsonl.gz": [{"query": "q", "choices": ["b", "a"], "gold": 1}],
    "winogrande_dev.jsonl.gz": [{"context_options": ["b x", "b y"], "continuation": "a", "gold": 0}],
    "arc_easy_test.jsonl.gz": [{"query": "q", "choices": CHOICES[:3], "gold": 0}],
    "arc_challenge_test.jsonl.gz": [{"query": "q", "choices": CHOICES, "gold": 3}],
    "mmlu_test_sample.jsonl.gz": [
        {"subject": "a_b", "query": "q", "choices": CHOICES, "gold": gold} for gold in (0, 3)
    ],
    "copa.jsonl.gz": [{"query": "q because", "choices": ["a", "b"], "gold": 1}],
    "boolq_val.jsonl.gz": [{"passage": "p", "query": "is it", "choices": ["no", "yes"], "gold": 0}],
    "wikitext2_raw_test.jsonl.gz": [{"text": "a b c"}, {"text": "a" * 100}],
}


class CodeScorer:
    """Token c costs c / 100 nats, and "a" is always the most likely one."""

    devices = 1
    model = config().model

    def __init__(self):
        self.shapes = set()

    def __call__(self, batch):
        targets = batch["tokens"][:, 1:]
        self.shapes.add(targets.shape)
        return TokenScores(targets / 100.0, np.full(targets.shape, ord("a")))


@pytest.fixture(scope="module")
def evalsets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evalsets")
    for name, rows in SETS.items():
        with gzip.open(folder / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def figures(evalsets):
    model = harness.MorLM(CodeScorer(), Tokenizer.bytes_level(), batch_size=4)
    return harness.run_tasks(model, list(TASKS), evalsets=evalsets)


def test_every_task_is_scored_by_the_likelihoods(figures):
    assert set(figures) == set(TASKS) and set(PAPER_TASKS) < set(TASKS)
    # in nats " cccc" costs 4.28, " aaa" 3.23, " bb" 2.28, " bbbb" 4.24: the cheapest is the third, and per character of
    # the choice the fourth, or without it the first
    assert figures["hellaswag"]["acc"] == 0.5 and figures["hellaswag"]["acc_norm"] == 0.5
    assert figures["arc_easy"]["acc"] == 0.0 and figures["arc_easy"]["acc_norm"] == 1.0
    assert figures["arc_challenge"]["acc"] == 0.0 and figures["arc_challenge"]["acc_norm"] == 1.0
    assert figures["piqa"]["acc"] == 1.0 and figures["copa"]["acc"] == 0.0
    assert figures["winogrande"]["acc"] == 1.0  # equal: the first
    assert figures["mmlu"]["acc"] == 0.5 and figures["mmlu"]["samples"] == 2  # " A" is cheapest
    assert figures["boolq"]["acc"] == 1.0  # " no" is shorter than " yes"


def test_perplexity_and_greedy_accuracy(figures):
    nats = [(32 + 97 + 97) / 100, (32 + 97 + 98) / 100]
    assert figures["lambada_openai"]["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert figures["lambada_openai"]["acc"] == 0.0  # the space is not the most likely token
    total, size = (97 + 98 + 99 + 2 * 32 + 100 * 97) / 100, 105
    assert figures["wikitext"]["bits_per_byte"] == pytest.approx(total / size / np.log(2), rel=1e-5)


def test_a_row_is_as_long_as_its_own_bucket(monkeypatch):
    monkeypatch.setattr(harness, "_SHORTEST", 4)
    scorer = CodeScorer()
    model = harness.MorLM(scorer, Tokenizer.bytes_level(), batch_size=2)
    assert [model.bucket(n) for n in (1, 4, 5, 9, 16, 40)] == [4, 4, 8, 16, 16, 16]
    requests = [(None, [1] * context, [97] * target) for context, target in ((2, 2), (2, 3), (30, 1), (1, 40), (9, 3))]
    results = model._loglikelihood_tokens(requests)
    assert [round(-score / 0.97) for score, _ in results] == [2, 3, 1, 40, 3] and all(greedy for _, greedy in results)
    assert scorer.shapes == {(2, 4), (2, 16)}
    with pytest.raises(UserError, match="without tokens"):
        model._loglikelihood_tokens([(None, [1], [])])


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_scores_of_a_model_do_not_depend_on_the_other_requests(kind, monkeypatch):
    monkeypatch.setattr(harness, "_SHORTEST", 8)
    cfg = config(kind)
    scorer = Scorer(weights(cfg, jnp.zeros(2)), cfg.perf, all_devices=False)
    model = harness.MorLM(scorer, Tokenizer.bytes_level(), batch_size=2)
    generator = np.random.default_rng(0)
    requests = [
        (None, generator.integers(0, 256, n).tolist(), generator.integers(0, 256, 3).tolist()) for n in (2, 5, 9, 20, 4)
    ]
    together = model._loglikelihood_tokens(requests)
    assert together == [model._loglikelihood_tokens([request])[0] for request in requests]
    assert together[::-1] == model._loglikelihood_tokens(requests[::-1])


def test_generation_is_greedy_and_stops():
    model = harness.MorLM(CodeScorer(), Tokenizer.bytes_level(), batch_size=1)
    assert model._generate("x", {"max_gen_toks": 5, "until": []}) == "aaaaa"
    assert model._generate("", {"max_gen_toks": 9, "until": ["aaa"]}) == ""
    with pytest.raises(UserError, match="do_sample"):
        model._generate("x", {"do_sample": True})


def test_texts_begin_as_with_transformers():
    llama2 = Path(__file__).parent.parent / "fixtures" / "tokenizers" / "llama2" / "tokenizer.json"
    model = harness.MorLM(CodeScorer(), Tokenizer.load(llama2), batch_size=1)
    assert (model.prefix_token_id, model.eot_token_id) == (1, 2)
    tokens = model.tok_encode("the cat")
    assert tokens[0] == 1 and model.tok_encode("the cat", add_special_tokens=False) == tokens[1:]
    assert model.tok_encode("<s>the cat") == model.tok_encode("<s>the cat", add_special_tokens=False)
    assert harness.MorLM(CodeScorer(), Tokenizer.bytes_level(), batch_size=1).prefix_token_id == 256


def test_mistakes_are_named(evalsets, tmp_path):
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        local_task("helaswag", evalsets)
    with pytest.raises(UserError, match=r"piqa_valid.jsonl.gz is missing: --evalsets"):
        local_task("piqa", tmp_path)
    (tmp_path / "copa.jsonl.gz").write_text("{}")
    with pytest.raises(UserError, match="truncated or not gzipped"):
        local_task("copa", tmp_path)
    for lines, words in (
        ([{"query": "q", "choices": ["a", "b"]}], r"copa.jsonl.gz, document 1: gold missing"),
        ([{"query": "q", "choices": ["a"], "gold": 0}, [1]], r"copa.jsonl.gz, document 2: not a JSON object"),
        ([], r"copa.jsonl.gz holds no documents"),
    ):
        with gzip.open(tmp_path / "copa.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(UserError, match=words):
            local_task("copa", tmp_path)

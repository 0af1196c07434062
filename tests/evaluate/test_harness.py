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
    with pytest.raises(UserError, match=r"copa\.jsonl\.gz is truncated, damaged or not \.gz data"):
        local_task("copa", tmp_path)
    for lines, words in (
        ([{"query": "q", "choices": ["a", "b"]}], r"copa.jsonl.gz, document 1: gold missing"),
        ([{"query": "q", "choices": ["a"], "gold": 0}, [1]], r"copa.jsonl.gz, line 2: not a JSON object"),
        ([], r"copa.jsonl.gz holds no documents"),
    ):
        _write_set(tmp_path / "copa.jsonl.gz", lines)
        with pytest.raises(UserError, match=words):
            local_task("copa", tmp_path)


def _write_set(path, rows):
    with gzip.open(path, "wt") as file:
        file.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def _pick(**changes):
    return {"query": "q", "choices": ["a", "b"], "gold": 1} | changes


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("copa", _pick(gold="1"), "gold='1' is not an integer"),
        ("copa", _pick(gold=1.0), "gold=1.0 is not an integer"),
        ("copa", _pick(gold=True), "gold=True is not an integer"),
        ("copa", _pick(gold=None), "gold=None is not an integer"),
        ("copa", _pick(gold=2), "gold=2 is outside 0..1, the choices"),
        ("copa", _pick(gold=-1), "gold=-1 is outside 0..1, the choices"),
        ("copa", _pick(gold=10**400), "gold=1000000"),
        ("copa", _pick(choices=[]), r"choices=\[\] is not a list of texts"),
        ("copa", _pick(choices="ab"), "choices='ab' is not a list of texts"),
        ("copa", _pick(choices={"a": 1}), "is not a list of texts"),
        ("copa", _pick(choices=["a", 2]), r"choices\[1\]=2 is not a text"),
        ("copa", _pick(choices=["a", None]), r"choices\[1\]=None is not a text"),
        ("copa", _pick(choices=["", "b"]), r"choices\[0\] is an empty text"),
        ("copa", _pick(choices=["a", "\ud800"]), r"choices\[1\] holds half of a surrogate pair at character 0"),
        ("copa", _pick(query=None), "query=None is not a text"),
        ("copa", _pick(query=["q"]), "is not a text"),
        ("copa", _pick(query="q\udc00"), "query holds half of a surrogate pair at character 1"),
        ("copa", "[" * 100_000, "not a JSON object"),
        ("copa", '{"query": ', "not a JSON object"),
        ("copa", "7", "not a JSON object"),
        ("mmlu", _pick(choices=list("abcdefghijk"), subject="s"), "11 choices are more than the 10 that have a letter"),
        ("mmlu", _pick(subject=None), "subject=None is not a text"),
        ("boolq", _pick(passage=3), "passage=3 is not a text"),
        ("winogrande", {"context_options": ["a"], "continuation": "c", "gold": 1}, "gold=1 is outside 0..0"),
        ("winogrande", {"context_options": None, "continuation": "c", "gold": 0}, "context_options=None is not a list"),
        ("winogrande", {"context_options": ["a", "b"], "continuation": " ", "gold": 0}, "continuation is an empty"),
        ("lambada_openai", {"context": "c", "continuation": ""}, "continuation is an empty text"),
        ("lambada_openai", {"context": 0, "continuation": "d"}, "context=0 is not a text"),
        ("wikitext", {"text": None}, "text=None is not a text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_document_that_cannot_be_scored_is_named(tmp_path, task, row, words):
    path = tmp_path / TASKS[task].file
    good = SETS[TASKS[task].file][0]
    _write_set(path, [good, "", row])
    with pytest.raises(UserError, match=rf"{path.name}, (document 2|line 3): .*{words}") as caught:
        local_task(task, tmp_path)
    assert len(str(caught.value)) < len(str(path)) + 200 and "\n" not in str(caught.value)


def test_damaged_files_and_sets_without_text_are_named(tmp_path):
    path = tmp_path / "wikitext2_raw_test.jsonl.gz"
    _write_set(path, [{"text": ""}, {"text": " "}])
    with pytest.raises(UserError, match="holds no text"):
        local_task("wikitext", tmp_path)
    whole = gzip.compress(b'{"text": "a"}\n' * 500)
    for damaged in (whole[:30], whole[:20] + b"\xff\xff\xff\xff" + whole[24:], gzip.compress(b'{"text": "\xff"}')):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"gz(, line 1)? is (truncated, damaged or not \.gz data|not UTF-8 text)"):
            local_task("wikitext", tmp_path)


def test_fields_that_no_task_reads_may_be_anything(tmp_path):
    rows = [_pick(id=1), _pick(id="two", note="\ud800"), _pick(id=[{}])]
    _write_set(tmp_path / "copa.jsonl.gz", rows)
    model = harness.MorLM(CodeScorer(), Tokenizer.bytes_level(), batch_size=4)
    assert harness.run_tasks(model, ["copa"], evalsets=tmp_path)["copa"]["samples"] == 3


class SpanningTokenizer:
    """Bytes, but for "r: C", which is one token (256), and "~" with a space before it, which have none."""

    vocab_size, eos_id, hash = 258, 257, "spanning"

    def encode(self, text):
        ids = []
        for part in text.replace(" ~", "").replace("~", "").split("r: C"):
            ids += [*part.encode(), 256]
        return ids[:-1]


def _instance(context, continuation, doc_id=0):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance("loglikelihood", {}, (context, continuation), 0, metadata=("task", doc_id, 1))


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("Answer:", " D", b"Answer:", b" D"),
        ("Answer:", " C", b"Answer:", b" C"),  # the joined text has as few tokens as the context alone
        ("Answer: ", "C", b"Answer:", b" C"),
        ("", "ab", [257], b"ab"),
        (" ", "ab", [257], b" ab"),
        ("~", "ab", [257], b"ab"),
    ],
)
def test_an_answer_that_shares_a_token_with_its_context_is_scored_alone(context, continuation, before, after):
    model = harness.MorLM(CodeScorer(), SpanningTokenizer(), batch_size=1)  # type: ignore[arg-type]
    assert model._pair(_instance(context, continuation)) == (list(before), list(after))
    if context == "Answer:" and continuation == " C":
        assert model._encode_pair(context, continuation)[1] == []  # what lm-eval would fail at
    nats = sum(after) / 100
    assert model.loglikelihood([_instance(context, continuation)])[0][0] == pytest.approx(-nats)


def test_a_document_without_tokens_is_named_and_other_tasks_keep_their_results(tmp_path):
    _write_set(tmp_path / "copa.jsonl.gz", [_pick()])
    _write_set(tmp_path / "hellaswag_val.jsonl.gz", [_pick(), _pick(choices=["a", "~"])])
    _write_set(tmp_path / "piqa_valid.jsonl.gz", [_pick()])
    model = harness.MorLM(CodeScorer(), SpanningTokenizer(), batch_size=4)  # type: ignore[arg-type]
    found = harness.run_tasks(model, ["copa", "hellaswag", "piqa"], evalsets=tmp_path)
    assert found["copa"]["samples"] == 1 == found["piqa"]["samples"]
    assert found["hellaswag"] == {"error": "hellaswag, document 2: the answer ' ~' has no tokens, and cannot be scored"}


def test_a_set_that_cannot_be_scored_is_told_before_anything_is(tmp_path):
    _write_set(tmp_path / "copa.jsonl.gz", [_pick()])
    _write_set(tmp_path / "piqa_valid.jsonl.gz", [_pick(gold=5)])
    scorer = CodeScorer()
    model = harness.MorLM(scorer, Tokenizer.bytes_level(), batch_size=4)
    with pytest.raises(UserError, match="document 1: gold=5"):
        harness.run_tasks(model, ["copa", "piqa"], evalsets=tmp_path)
    assert not scorer.shapes


def test_an_unknown_task_of_lm_eval_is_named():
    model = harness.MorLM(CodeScorer(), Tokenizer.bytes_level(), batch_size=4)
    with pytest.raises(UserError, match="lm-eval knows no task 'helaswag'; did you mean 'hellaswag'"):
        harness.run_tasks(model, ["helaswag"], evalsets=None)

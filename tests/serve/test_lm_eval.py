"""lm-eval's `local-completions` against a server says what our adapter says of the same model."""

import gzip
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from live_server import ENGINE, MODEL, NAME, running

from mor_jax.config import PerfConfig
from mor_jax.data.tokenizer import END_OF_TEXT, train_bpe
from mor_jax.evaluate.scoring import Scorer
from mor_jax.evaluate.tasks.local import TASKS, local_task
from mor_jax.infer.language_model import LanguageModel
from mor_jax.model.parameters import Weights
from mor_jax.model.transformer import init_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that lm-eval imports
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mor_jax.evaluate.harness import MorLM

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WORDS = ["the", "a", "return", "value", "function", "is", "not", "it", "was", "in", "of", "hat", "cat", "saw", "one"]


def _sets(folder):
    generator = np.random.default_rng(0)
    text = lambda least=2: " ".join(generator.choice(WORDS, int(generator.integers(least, 6))))  # noqa: E731
    rows = {
        "arc_easy": [{"query": text(), "choices": [text() for _ in range(3)], "gold": 1} for _ in range(8)],
        "lambada_openai": [{"context": text(), "continuation": " " + text(1)} for _ in range(8)],
    }
    for name, documents in rows.items():
        with gzip.open(folder / TASKS[name].file, "wt") as file:
            file.write("".join(json.dumps(document) + "\n" for document in documents))
    return [local_task(name, folder) for name in rows]


def _evaluate(tasks, **model):
    output = simple_evaluate(
        tasks=tasks, bootstrap_iters=0, log_samples=True, task_manager=TaskManager(include_defaults=False), **model
    )
    responses = [sample["filtered_resps"] for task in output["samples"].values() for sample in task]
    figures = {
        (task, name): value
        for task, values in output["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    return [pair for pairs in responses for pair in pairs], figures


@pytest.mark.parametrize("rows", [1, 5])
def test_likelihoods_and_figures_are_those_of_the_adapter(tmp_path, rows):
    tokenizer = train_bpe([" ".join(WORDS) + " " + " ".join(WORDS[::-1])] * 20, MODEL.vocab_size + 40)
    config = type(MODEL)(**{**vars(MODEL), "vocab_size": MODEL.vocab_size + 40})
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens.json").unlink()
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    params = jax.jit(lambda: init_params(config, jax.random.key(1)))()
    scorer = Scorer(Weights(config, jax.tree.map(jnp.asarray, params)), PerfConfig(), all_devices=False)
    tasks = _sets(tmp_path)
    want, wanted = _evaluate(tasks, model=MorLM(scorer, tokenizer, batch_size=8))
    with running(LanguageModel(config, params, tokenizer), ENGINE) as server:
        arguments = {
            "model": NAME, "base_url": f"http://127.0.0.1:{server.port}/v1/completions", "max_length": 96,
            "tokenizer": str(tmp_path), "tokenizer_backend": "huggingface", "num_concurrent": 1,
        }  # fmt: skip
        got, figures = _evaluate(tasks, model="local-completions", model_args=arguments, batch_size=rows)
    assert len(got) == len(want) >= 32
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in want], atol=1e-4, rtol=0)
    assert [bool(greedy) for _, greedy in got] == [bool(greedy) for _, greedy in want]
    assert figures.keys() == wanted.keys() and all(
        value == pytest.approx(wanted[name], rel=1e-4, abs=1e-4) for name, value in figures.items()
    )

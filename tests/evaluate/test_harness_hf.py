"""Our lm-eval adapter beside lm-eval's own on the exported folder: the same figures, request by request."""

import dataclasses
import gzip
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ModelConfig, PerfConfig, RecursionConfig, RoutingConfig
from mor_jax.data.tokenizer import END_OF_TEXT, train_bpe
from mor_jax.errors import UserError
from mor_jax.evaluate.scoring import Scorer
from mor_jax.evaluate.tasks.local import local_task
from mor_jax.interop import convert, sources
from mor_jax.interop import weights_folder as weights
from mor_jax.model.parameters import Weights
from mor_jax.model.transformer import init_params

pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that lm-eval imports
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from mor_jax.evaluate import harness

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # theirs
VANILLA = ModelConfig(
    vocab_size=320, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, context_length=128,
    dtype="float32", init_std=0.2, attend_across_documents=False,
)  # fmt: skip
RECURSIVE = dataclasses.replace(VANILLA, num_layers=5, recursion=RecursionConfig(3, "middle_cycle"))
MOR = dataclasses.replace(RECURSIVE, routing=RoutingConfig("expert"))
TEXT = "the cat sat on a mat and one two three dogs ran far over naïve hills; don't stop"
WORDS = TEXT.split()
TASKS = ("hellaswag", "arc_easy", "lambada_openai", "mmlu", "winogrande", "wikitext")


def _sentence(generator, length):
    return " ".join(generator.choice(WORDS, length))


def _sets(folder):
    """Twelve documents of every task; the last one's prompts are longer than the context."""
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(3, 20, 11), 120]
    rows = {name: [] for name in TASKS}
    for nth, length in enumerate(lengths):
        text = lambda count=int(length): _sentence(generator, count)  # noqa: E731
        choices = [_sentence(generator, int(n)) for n in generator.integers(1, 6, 4)]
        picked = {"query": text(), "choices": choices, "gold": nth % 4}
        rows["hellaswag"].append(picked)
        rows["arc_easy"].append(picked)
        rows["mmlu"].append(picked | {"subject": "some_words"})
        rows["lambada_openai"].append({"context": text(), "continuation": _sentence(generator, 1)})
        options = [text(), text()]
        rows["winogrande"].append(
            {"context_options": options, "continuation": _sentence(generator, 3), "gold": nth % 2}
        )
        rows["wikitext"].append({"text": text()})
    for name, documents in rows.items():
        with gzip.open(folder / harness_file(name), "wt") as file:
            file.write("".join(json.dumps(document) + "\n" for document in documents))


def harness_file(task):
    from mor_jax.evaluate.tasks.local import TASKS as known

    return known[task].file


def export(model, folder):
    """Write a model with random weights as ours and as a Hugging Face folder; return ours, opened."""
    tokenizer = train_bpe([TEXT] * 20, model.vocab_size)
    params = jax.jit(lambda: init_params(model, jax.random.key(1)))()
    ours = folder / "ours"
    ours.mkdir(parents=True)
    weights.save(ours, model, params, tokenizer, origin="a test")
    loaded = sources.open_model(ours)
    convert.write(loaded, "hf", folder / "hf")
    path = folder / "hf" / "tokenizer_config.json"
    described = json.loads(path.read_text())
    if "eos_token" not in described:
        path.write_text(json.dumps(described | {"eos_token": END_OF_TEXT}))
    return loaded


@pytest.fixture(scope="module", params=[VANILLA, RECURSIVE], ids=["vanilla", "recursive"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    loaded = export(request.param, folder)
    held = Weights.of_tree(loaded.model, jax.tree.map(jnp.asarray, loaded.params))
    scorer = Scorer(held, PerfConfig(), all_devices=False)
    assert loaded.tokenizer is not None
    ours = harness.MorLM(scorer, loaded.tokenizer, batch_size=8)
    theirs = HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=8)
    return ours, theirs


def _figures(model, folder):
    output = simple_evaluate(
        model=model,
        tasks=[local_task(name, folder) for name in TASKS],
        bootstrap_iters=0,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )
    return {
        f"{task} {name}": value
        for task, values in output["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_figures_of_tasks_agree(both, tmp_path):
    _sets(tmp_path)
    ours, theirs = (_figures(model, tmp_path) for model in both)
    assert ours.keys() == theirs.keys() and len(ours) >= 10
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name


def test_every_request_agrees(both):
    pairs = [("the cat", " sat on"), ("", "one two"), ("two ", "three"), (" ", "cat"), ("a" * 300, " mat"), ("x", "\n")]
    for texts in pairs:
        request = Instance("loglikelihood", {}, texts, 0, metadata=("task", 0, 1))
        try:
            (wanted,) = both[1].loglikelihood([request], disable_tqdm=True)
        except AssertionError:
            assert texts == (" ", "cat")  # a context of nothing but spaces: lm-eval fails
            wanted = None
        (found,) = both[0].loglikelihood([request])
        if wanted is not None:
            assert found[0] == pytest.approx(wanted[0], abs=1e-4) and found[1] == wanted[1], texts


def test_the_adapter_continues_as_the_exported_model_does(both):
    request = Instance("generate_until", {}, ("the cat", {"max_gen_toks": 12, "until": ["\n\n"]}), 0)
    assert both[0].generate_until([request]) == both[1].generate_until([request], disable_tqdm=True)


def test_a_router_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"plain Llama cannot express this model: routing.kind='expert'"):
        export(MOR, tmp_path)
    assert not (tmp_path / "hf").exists()

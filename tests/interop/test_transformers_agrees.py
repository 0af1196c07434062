"""Exported vanilla and recursive models in `transformers`: the same prompts, greedy continuations and texts."""

import dataclasses

import pytest
from test_exported_tokens import FIXTURES, KINDS, MODEL, RECURSIVE
from test_llama import random_params

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.language_model import LanguageModel, load
from mor_jax.interop import convert
from mor_jax.interop.sources import LoadedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
PROMPTS = ["the cat", "one two three", "caf\u00e9 \U0001f600", " 10", "<|im_start|>x"]


@pytest.mark.parametrize("model", [MODEL, RECURSIVE], ids=["vanilla", "recursive"])
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_greedy_continuations_are_those_of_transformers(kind, model, tmp_path):
    tokenizer = Tokenizer.bytes_level() if kind == "bytes" else Tokenizer.load(FIXTURES / kind / "tokenizer.json")
    model = dataclasses.replace(model, context_length=64, vocab_size=tokenizer.vocab_size)
    params = random_params(model)
    convert.write(LoadedModel(model, params, tokenizer, "run", "a test"), "hf", tmp_path / "hf")
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (names.bos_token_id, names.eos_token_id) == (tokenizer.special.bos_id, tokenizer.eos_id)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    stops = theirs.generation_config.eos_token_id
    assert ([stops] if isinstance(stops, int) else stops) == list(tokenizer.special.stop_ids)
    for ours in (LanguageModel(model, params, tokenizer), load(tmp_path / "hf")):
        for prompt, completion in zip(PROMPTS, ours.generate(PROMPTS, max_tokens=20), strict=True):
            ids = names(prompt, return_tensors="pt")["input_ids"]
            if kind != "bytes" or not prompt.startswith("<|"):
                assert ours.tokenizer.encode(prompt) == ids[0].tolist()
            made = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0]
            assert completion.tokens == made[ids.shape[1] :].tolist()
            before, whole = (names.decode(row, skip_special_tokens=True) for row in (ids[0], made))
            assert completion.text == whole[len(before) :]
            assert completion.finish == ("stop" if made[-1] in tokenizer.special.stop_ids else "length")

"""Eight kinds of public tokenizers: ids, texts and special tokens as `transformers` has them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from mor_jax.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
TEXTS, KINDS = EXPECTED["texts"], EXPECTED["kinds"]
STOPS = {
    "llama2": ["</s>"], "mistral": ["</s>"], "gemma": ["<eos>", "<end_of_turn>"], "smollm2": ["<|im_end|>"],
    "llama3": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "qwen2": ["<|im_end|>", "<|endoftext|>"],
    "gpt2": ["<|endoftext|>"], "byte_fallback": ["</s>"],
}  # fmt: skip
BEFORE = {"llama2": ["<s>"], "mistral": ["<s>"], "gemma": ["<bos>"], "llama3": ["<|begin_of_text|>"]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind) -> Tokenizer:
    return Tokenizer.load(FIXTURES / kind / "tokenizer.json")


def test_prompts_have_the_ids_of_transformers(kind, tokenizer):
    assert [tokenizer.encode(text) for text in TEXTS] == KINDS[kind]["ids"]


def test_ids_have_the_texts_of_transformers(kind, tokenizer):
    for ids, text in KINDS[kind]["decoded"]:
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_those_of_transformers(kind, tokenizer):
    special = tokenizer.special
    found = {"bos": special.bos_id, "eos": special.eos_id, "pad": special.pad_id, "unk": special.unk_id}
    assert found == KINDS[kind]["special"]
    assert special.chat_template == KINDS[kind]["chat_template"]
    assert [tokenizer.token_text(i) for i in special.stop_ids] == STOPS[kind]
    assert [tokenizer.token_text(i) for i in special.before] == BEFORE.get(kind, []) and special.after == ()


def test_documents_cannot_forge_special_tokens(kind, tokenizer):
    special = set(tokenizer.special.stop_ids)
    for text in TEXTS:
        (document,) = tokenizer.encode_documents([text])
        inside = document[len(tokenizer.special.before) : -1].tolist()
        assert document[-1] == tokenizer.eos_id
        if kind != "byte_fallback":  # a unigram model takes a special token that its vocabulary holds for a piece
            assert not special & set(inside)
        assert document[: len(tokenizer.special.before)].tolist() == list(tokenizer.special.before)


def test_a_saved_tokenizer_is_the_same(kind, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special == tokenizer.special and loaded.identity == tokenizer.identity
    assert [loaded.encode(text) for text in TEXTS] == KINDS[kind]["ids"]


def test_the_fixtures_are_what_transformers_makes_now(kind, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(FIXTURES), *sys.path])
    import make  # pyright: ignore[reportMissingImports]

    shutil.copytree(FIXTURES / kind, tmp_path / kind)
    assert json.loads(json.dumps(make.expected(tmp_path / kind))) == KINDS[kind]

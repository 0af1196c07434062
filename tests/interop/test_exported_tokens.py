"""Special tokens of models that are converted: Hugging Face to ours and back loses nothing; ours name theirs."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
from test_llama import TINY, random_params

from mor_jax.cli import main
from mor_jax.config import RecursionConfig
from mor_jax.data.special_tokens import RECORD
from mor_jax.data.tokenizer import Tokenizer, train_bpe
from mor_jax.interop import convert, llama
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.sources import LoadedModel, open_model
from mor_jax.interop.tensor_files import write_shards

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"
KINDS = sorted(path.parent.name for path in FIXTURES.glob("*/tokenizer.json"))
MODEL = dataclasses.replace(TINY, num_layers=2, vocab_size=416)
RECURSIVE = dataclasses.replace(TINY, num_layers=4, vocab_size=416, recursion=RecursionConfig(2, "middle_cycle"))


def model_folder(kind: str, path: Path) -> Path:
    """A Hugging Face folder of a tiny model with one of the tokenizers."""
    path.mkdir()
    for file in (FIXTURES / kind).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(llama.describe_config(MODEL) | tokens))
    write_shards(path, llama.written_shapes(MODEL), llama.unrolled(MODEL, random_params(MODEL)))
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_to_ours_and_back_loses_nothing(kind, tmp_path):
    source = model_folder(kind, tmp_path / "hf")
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert main(["convert", str(source), "--out", str(ours)]) == 0
    assert main(["convert", str(ours), "--to", "hf", "--out", str(again)]) == 0
    assert open_model(ours).tokenizer.special == open_model(source).tokenizer.special  # type: ignore[union-attr]
    for file in source.glob("*"):
        if file.name in ("model.safetensors", "config.json", "tokenizer_config.json", "generation_config.json"):
            continue
        assert (again / file.name).read_bytes() == file.read_bytes() or read(again / file.name) == read(file)
    before, after = read(source / "config.json"), read(again / "config.json")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after.get(name) == before.get(name)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            assert read(source / name).items() <= read(again / name).items()
    theirs, mine = (Tokenizer.load(path / "tokenizer.json") for path in (source, again))
    assert dataclasses.replace(mine.special, files={}) == dataclasses.replace(theirs.special, files={})
    assert mine.special.chat_template == theirs.special.chat_template
    assert "eos_token" in read(again / "tokenizer_config.json") | (
        read(again / "special_tokens_map.json") if (again / "special_tokens_map.json").is_file() else {}
    )


def exported(tokenizer: Tokenizer, path: Path) -> Path:
    loaded = LoadedModel(RECURSIVE, random_params(RECURSIVE), tokenizer, "run", "a test")
    convert.write(loaded, "hf", path)
    return path


@pytest.mark.parametrize("tokenizer", [Tokenizer.bytes_level(), train_bpe(["the cat"], 300)], ids=["bytes", "bpe"])
def test_our_own_tokenizers_are_exported_with_their_names(tokenizer, tmp_path):
    path = exported(tokenizer, tmp_path / "hf")
    end = tokenizer.eos_id
    assert read(path / "config.json")["eos_token_id"] == read(path / "generation_config.json")["eos_token_id"] == end
    assert read(path / "config.json")["bos_token_id"] is None
    assert read(path / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"
    assert read(path / "special_tokens_map.json") == {"eos_token": "<|endoftext|>"}
    theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in ("the cat", " caf\u00e9\n\n", "\U0001f600 x", ""):
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.token_to_id("<|endoftext|>") == end


def test_what_a_model_has_never_seen_is_not_put_before_its_texts_elsewhere(tmp_path):
    """A run from before the records, of a tokenizer that adds BOS: its rows had none."""
    llama2 = FIXTURES / "llama2" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(llama2.read_bytes())
    (tmp_path / "manifest.json").write_text("{}")
    path = exported(Tokenizer.load(tmp_path / "tokenizer.json"), tmp_path / "hf")
    theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    assert theirs.encode("the cat").ids == Tokenizer.load(llama2).encode("the cat")[1:]


def test_a_tokenizer_put_beside_weights_brings_its_files(tmp_path):
    (tmp_path / "ours").mkdir()
    weights.save(tmp_path / "ours", MODEL, random_params(MODEL), None, origin="a test")
    tokenizer = str(FIXTURES / "gemma" / "tokenizer.json")
    out = str(tmp_path / "out")
    assert main(["convert", str(tmp_path / "ours"), "--tokenizer", tokenizer, "--out", out]) == 0
    special = read(tmp_path / "out" / RECORD)
    assert (special["bos_id"], special["stop_ids"], special["before"]) == (2, [1, 6], [2])

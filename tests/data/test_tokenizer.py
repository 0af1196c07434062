"""Round trips of all three kinds of tokenizer, and bad definitions."""

import json

import pytest
import tokenizers
from tokenizers import models, trainers

from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer, parse_spec, spec_identity, train_bpe
from mor_jax.errors import UserError

ALL_BYTES = "".join(map(chr, range(0x110))) + "日本語 \U0001f600"
TEXTS = ["the cat sat on the mat, the dog sat on the log. " * 20, "Größe, 12345"]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return Tokenizer.bytes_level() if request.param == "bytes" else train_bpe(TEXTS, 300)


@pytest.mark.parametrize("text", ["", "the cat\n\n sat\t", ALL_BYTES, f"a {END_OF_TEXT} b"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode_batch([text])[0].tolist()
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch([text, text])[1].tolist() == ids
    assert tokenizer.encode_documents([text])[0].tolist() == [*ids, tokenizer.eos_id]


def test_every_byte_has_a_token(tokenizer):
    assert {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}


def test_end_of_text_is_empty(tokenizer):
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"" and tokenizer.decode([tokenizer.eos_id]) == ""


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.hash == tokenizer.hash and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert spec_identity(str(tmp_path / "tokenizer.json")) == tokenizer.hash


def test_sizes():
    assert (Tokenizer.bytes_level().vocab_size, Tokenizer.bytes_level().eos_id) == (257, 256)
    bpe = train_bpe(TEXTS, 300)
    assert bpe.vocab_size == 300 and bpe.encode("the cat") != train_bpe(TEXTS, 257).encode("the cat")


def test_vocabulary_is_filled_up_where_the_text_is_small():
    bpe = train_bpe(["abc"], 400)
    assert bpe.vocab_size == 400 and bpe.token_bytes(399) == b"" and bpe.encode("<|reserved_300|>") == [300]


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 320).hash == train_bpe(TEXTS, 320).hash != train_bpe(TEXTS, 319).hash


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    model = tokenizers.Tokenizer(models.BPE())
    model.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<pad>"], show_progress=False))
    model.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json: no end-of-text token .*<pad>.*eos_token"):
        Tokenizer.load(tmp_path / "t.json")


def test_sentencepiece_style_tokens(tmp_path):
    vocab = {"</s>": 0, "<0x0A>": 1, "\u2581the": 2}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    model.add_special_tokens(["</s>"])
    loaded = Tokenizer(model.to_str())
    assert [loaded.token_bytes(i) for i in range(3)] == [b"", b"\n", b" the"]


@pytest.mark.parametrize("content", ["", "{", json.dumps({"kind": "words"}), "[]"])
def test_bad_definitions(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a tokenizer definition"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:", "after 'bpe:'"),
        ("bpe:12", "in 257..1048576"),
        ("bpe:" + "9" * 30, "in 257..1048576"),
        ("bpe:x", "after 'bpe:'"),
        ("byte", "neither 'bytes'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        parse_spec(spec)


def test_ids_outside_the_vocabulary(tokenizer):
    with pytest.raises(UserError, match="outside"):
        tokenizer.token_bytes(tokenizer.vocab_size)

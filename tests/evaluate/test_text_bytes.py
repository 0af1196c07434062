"""Bytes of tokens: added up over a document they are the text's, for every kind of tokenizer."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from evaluation_examples import Bytes, T, config, weights
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mor_jax.data.packing import Row, expand_row
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluate.sliding import sliding_losses, text_stream
from mor_jax.evaluate.text_bytes import target_bytes, token_lengths
from mor_jax.evaluate.text_loss import read_streams

END = "<|endoftext|>"
CORPUS = ["The cat sat on the mat. Don't stop now, please; naïve café = x + 1\n"] * 20
TEXTS = (
    "The cat sat.",
    "on  the\n\tmat 123",
    "naïve café 日本語 😀",
    "😀 first",
    "x",
)
SPACED = (" the cat", "  two", " ")


def _byte_level(prefix):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet)
    )
    return model


def _sentence_piece(normalizer, pre_tokenizer):
    """Byte fallback, with a space put before a text."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainers.BpeTrainer(vocab_size=90))
    learnt = json.loads(trained.to_str())["model"]
    vocab = {END: 0, "<unk>": 1, "<s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for token in sorted(learnt["vocab"], key=learnt["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        model.normalizer = normalizer
    if pre_tokenizer is not None:
        model.pre_tokenizer = pre_tokenizer
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    model.add_special_tokens([END, "<unk>", "<s>"])
    return model


def _word_piece():
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    model.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", END]))
    return model


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
MODELS = {
    "byte level": lambda: _byte_level(False),
    "byte level, prefix": lambda: _byte_level(True),
    "llama 2": lambda: _sentence_piece(LLAMA_2, None),
    "no prefix": lambda: _sentence_piece(normalizers.Replace(" ", "▁"), None),
    "metaspace": lambda: _sentence_piece(None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "word piece": _word_piece,
}


@pytest.fixture(scope="module", params=[*MODELS, "bytes"])
def named(request):
    if request.param == "bytes":
        return request.param, Tokenizer.bytes_level()
    return request.param, Tokenizer(MODELS[request.param]().to_str())


def _row_bytes(tokenizer, row):
    lengths, whole = token_lengths(tokenizer, 1000), expand_row(row, len(row.tokens))
    return target_bytes(lengths, whole["tokens"][None], whole["positions"][None])[0]


def test_tokens_of_packed_rows_have_the_bytes_of_their_documents(named):
    """From token ids alone. What the ids do not hold cannot be counted: WordPiece's case, line ends, unknown words."""
    name, tokenizer = named
    texts = TEXTS if name != "word piece" else ("the cat sat.", "don't stop, please")
    texts += SPACED if name not in ("word piece", "byte level, prefix", "metaspace") else ()
    end = [tokenizer.eos_id]
    sizes = _row_bytes(tokenizer, text_stream([np.append(ids, end) for ids in tokenizer.encode_batch(texts)], end))
    ends = np.cumsum([len(ids) + 1 for ids in tokenizer.encode_batch(texts)])
    found = [int(part.sum()) for part in np.split(sizes, ends[:-1])]
    wanted = [len(text.encode()) for text in texts]
    if name == "word piece":
        wanted = [len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts]
    assert found == wanted


def test_a_beginning_of_sequence_token_does_not_hide_the_beginning():
    tokenizer = Tokenizer(MODELS["llama 2"]().to_str())
    first, second = ([*tokenizer.encode(text), 0] for text in ("The cat", "The"))
    assert (first[0], second[0]) == (2, 2)
    row = Row(np.array([0, *first, *second]), np.array([0, 1, 1 + len(first)]))
    assert _row_bytes(tokenizer, row).sum() == len("The cat") + len("The")


def test_bytes_of_files_are_those_of_their_texts(named, tmp_path):
    """Whatever the tokenizer loses."""
    _, tokenizer = named
    lines = [{"text": text} for text in (*TEXTS, *SPACED[:2], "▁", "\N{FULLWIDTH LATIN SMALL LETTER W}\u00a0ﬁ")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.txt").write_text("  plain\n")
    streams, sizes = read_streams([tmp_path / "a.jsonl", tmp_path / "b.txt"], tokenizer)
    base = config("none")
    cfg = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=400))
    found = sliding_losses(weights(cfg), cfg.perf, streams, tokenizer, batch_rows=2, text_bytes=sizes)["sources"]
    assert found["a.jsonl"]["bytes"] == sum(len(line["text"].encode()) for line in lines)
    assert found["all"]["bytes"] == found["a.jsonl"]["bytes"] + len(b"  plain\n")
    bits = found["all"]["nll"] * found["all"]["tokens"] / np.log(2) / found["all"]["bytes"]
    np.testing.assert_allclose(found["all"]["bits_per_byte"], bits)


def test_special_and_unused_entries_have_no_bytes():
    lengths = token_lengths(Bytes(), 260)
    assert lengths[:, :256].tolist() == [[1] * 256] * 2 and not lengths[:, 256:].any()


def test_jax_and_numpy_agree():
    tokens = np.arange(2 * (T + 1)).reshape(2, T + 1)
    positions = np.tile(np.arange(T + 1) % 5, (2, 1))
    lengths = np.stack([np.arange(40) % 3, np.arange(40) % 4]).astype(np.int32)
    plain = target_bytes(lengths, tokens, positions)
    assert plain.tolist() == np.asarray(target_bytes(*map(jnp.asarray, (lengths, tokens, positions)))).tolist()
    assert (plain[0, 1], plain[0, 3], plain[0, 4]) == (2, 4 % 3, 5 % 4)  # token 5 begins a text, 2 and 4 do not

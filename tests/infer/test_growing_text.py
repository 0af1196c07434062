"""Text that grows token by token is the text decoded at once, for every kind of decoder and any prompt."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.growing_text import GrowingText

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"
KINDS = sorted(path.parent.name for path in FIXTURES.glob("*/tokenizer.json"))
PROMPTS = ("", "the cat", "one ", "日本語 😀", "naïve " * 40, "x = 10 +\n")
BAD = "\N{REPLACEMENT CHARACTER}"


def word_pieces() -> Tokenizer:
    """Words of a BERT-like vocabulary, joined by spaces but for continuations."""
    vocabulary = ["[UNK]", "[SEP]", "the", "cat", "##s", ",", "don", "'", "t", "##t"]
    model = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    model.decoder = decoders.WordPiece()
    model.add_special_tokens(["[UNK]", "[SEP]"])
    return Tokenizer(model.to_str(), special=Tokenizer.bytes_level().special)


def suffixes() -> Tokenizer:
    """Words that end with a mark, which the last one of a text loses."""
    model = tokenizers.Tokenizer(models.BPE(vocab={"a</w>": 0, "b": 1, "c</w>": 2, "</s>": 3}, merges=[]))
    model.decoder = decoders.BPEDecoder()
    model.add_special_tokens(["</s>"])
    return Tokenizer(model.to_str())


@pytest.fixture(scope="module", params=[*KINDS, "bytes", "word_pieces", "suffixes"])
def tokenizer(request) -> Tokenizer:
    made = {"bytes": Tokenizer.bytes_level, "word_pieces": word_pieces, "suffixes": suffixes}
    return (
        made[request.param]() if request.param in made else Tokenizer.load(FIXTURES / request.param / "tokenizer.json")
    )


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    texts = [tokenizer.encode(text) for text in PROMPTS]
    return [ids for ids in texts if not tokenizer.decode(ids).endswith(BAD)]


@pytest.mark.parametrize("seed", range(8))
def test_pieces_join_to_the_text_behind_the_prompt(tokenizer, seed):
    rng = np.random.default_rng(seed)
    for prompt in prompts(tokenizer):
        ids = rng.integers(0, tokenizer.vocab_size, 40).tolist()
        if seed % 2:  # long rows of byte tokens, where there are such
            ids = [i if rng.random() < 0.2 else int(rng.integers(3, min(250, tokenizer.vocab_size))) for i in ids]
        text = GrowingText(tokenizer, ["no such text"], prompt)
        shown = ""
        for nth, token in enumerate(ids):
            shown += text.add(token, last=nth == len(ids) - 1)
            at_once = tokenizer.decode([*prompt, *ids[: nth + 1]])[len(tokenizer.decode(prompt)) :]
            assert text.text == at_once
            assert at_once.startswith(shown)
        assert shown == text.text


def test_a_completion_keeps_its_first_space():
    llama = Tokenizer.load(FIXTURES / "llama2" / "tokenizer.json")
    prompt = llama.encode("the cat")
    whole = llama.encode("the cat sat on")
    assert whole[: len(prompt)] == prompt
    text = GrowingText(llama, prompt=prompt)
    assert "".join(text.add(token) for token in whole[len(prompt) :]) == " sat on"


def test_a_stop_string_that_begins_with_the_first_space_is_seen():
    llama = Tokenizer.load(FIXTURES / "llama2" / "tokenizer.json")
    prompt, whole = llama.encode("one"), llama.encode("one two three")
    text = GrowingText(llama, [" two"], prompt)
    assert "".join(text.add(token) for token in whole[len(prompt) :]) == "" and text.stopped


def test_half_a_character_at_the_prompts_end_is_completed():
    gpt2 = Tokenizer.load(FIXTURES / "gpt2" / "tokenizer.json")
    ids = gpt2.encode("a\U0001f680b")
    cut = next(i for i in range(1, len(ids)) if gpt2.decode(ids[:i]).endswith(BAD))
    text = GrowingText(gpt2, prompt=ids[:cut])
    assert "".join(text.add(token) for token in ids[cut:]) == "\U0001f680b"


def test_bytes_are_shown_when_nothing_can_undo_them():
    llama = Tokenizer.load(FIXTURES / "llama2" / "tokenizer.json")
    bytes_of = [llama.encode(text)[-1] for text in ("\x00", "\x01")]
    first, second = (bytes_of[0] + byte for byte in "é".encode())
    text = GrowingText(llama, prompt=llama.encode("the"))
    letter = llama.encode("the cat")[-1]
    assert [text.add(first), text.add(second), text.add(letter)] == ["", "", "é cat"]
    undone = GrowingText(llama, prompt=llama.encode("the"))
    assert [undone.add(i) for i in (first, second, second, letter)] == ["", "", "", BAD * 3 + " cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_decoded_at_a_time(kind, monkeypatch):
    tokenizer = Tokenizer.load(FIXTURES / kind / "tokenizer.json")
    most, decode = 0, tokenizer.decode

    def counted(ids):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    ids = tokenizer.encode("the cat sat on the mat. Hello world! " * 30)
    text = GrowingText(tokenizer, prompt=ids)
    for token in ids:
        text.add(token)
    assert most <= 32 < len(ids)

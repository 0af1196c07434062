"""Where special tokens are found: the precedence of the files, a tokenizer.json alone, records, and bad entries."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, processors

from mor_jax.data.special_tokens import RECORD, SpecialTokens
from mor_jax.data.tokenizer import Tokenizer, spec_identity, train_bpe
from mor_jax.errors import UserError

NAMES = ["<pad>", "<unk>", "<s>", "</s>", "<|im_end|>", "<|eot|>"]
IDS = {name: i for i, name in enumerate(NAMES)}


def definition(special=tuple(NAMES), *, post=None, unk=None) -> str:
    vocabulary = {name: i for i, name in enumerate([*special, "a", "b"])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unk))
    model.add_special_tokens(list(special))
    if post is not None:
        tokens = [(name, vocabulary[name]) for name in special if name in post]
        model.post_processor = processors.TemplateProcessing(single=post, special_tokens=tokens)
    return model.to_str()


def folder(path: Path, text: str, **files) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, values in files.items():
        written = values if isinstance(values, str) else json.dumps(values)
        (path / f"{name}.{'jinja' if name == 'chat_template' else 'json'}").write_text(written, encoding="utf-8")
    return path / "tokenizer.json"


def find(path: Path, text: str | None = None, **files) -> SpecialTokens:
    return Tokenizer.load(folder(path, text or definition(), **files)).special


CONFIG = {"eos_token": "</s>"}


@pytest.mark.parametrize(
    ("files", "eos", "stops"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>", ["<|im_end|>"]),
        ({"tokenizer_config": {"eos_token": {"content": "<|eot|>", "lstrip": True}}}, "<|eot|>", ["<|eot|>"]),
        ({"special_tokens_map": {"eos_token": "<|eot|>"}, "tokenizer_config": CONFIG}, "<|eot|>", ["<|eot|>"]),
        (
            {
                "special_tokens_map": {"eos_token": "<|eot|>"},
                "tokenizer_config": {**CONFIG, "added_tokens_decoder": {}},
            },
            "</s>",
            ["</s>"],
        ),
        ({"config": {"eos_token_id": 4}}, "<|im_end|>", ["<|im_end|>"]),
        ({"config": {"eos_token_id": 4}, "tokenizer_config": CONFIG}, "</s>", ["<|im_end|>"]),
        ({"config": {"eos_token_id": [5, 4, 5]}}, "<|eot|>", ["<|eot|>", "<|im_end|>"]),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 5]}}, "<|im_end|>", NAMES[4:]),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": None}}, "</s>", ["</s>"]),
        ({"config": {"eos_token_id": None}, "tokenizer_config": CONFIG}, "</s>", ["</s>"]),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, "</s>", ["</s>"]),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 5}}, "<|eot|>", ["<|eot|>"]),
    ],
)
def test_the_end_of_text_by_the_precedence_of_the_files(files, eos, stops, tmp_path):
    special = find(tmp_path, **files)
    assert NAMES[special.eos_id] == eos and [NAMES[i] for i in special.stop_ids] == stops


@pytest.mark.parametrize(
    ("files", "bos", "pad"),
    [
        ({"config": {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}}, 2, 0),
        ({"config": {"bos_token_id": 2, "pad_token_id": -1}, "tokenizer_config": CONFIG}, None, None),
        ({"tokenizer_config": {**CONFIG, "bos_token": "<s>", "pad_token": "<pad>"}}, 2, 0),
        ({"tokenizer_config": {**CONFIG, "tokenizer_class": "LlamaTokenizer", "bos_token": None}}, None, None),
    ],
)
def test_what_begins_and_pads(files, bos, pad, tmp_path):
    special = find(tmp_path, **files)
    assert (special.bos_id, special.pad_id) == (bos, pad)
    assert special.start_id == (special.eos_id if bos is None else bos)


@pytest.mark.parametrize(
    ("post", "before", "after", "eos"),
    [("<s> $A", [2], [], 3), ("<s> $A <|eot|>", [2], [5], 5), ("$A </s>", [], [3], 3), (None, [], [], 3)],
)
def test_what_the_post_processor_puts_around_a_text(post, before, after, eos, tmp_path):
    """Whatever `add_bos_token` says: with a tokenizer.json, transformers 5 does not look at it."""
    text = definition(post=post)
    config = {"add_bos_token": not before, "eos_token": NAMES[eos]}
    loaded = Tokenizer.load(folder(tmp_path, text, tokenizer_config=config))
    assert (list(loaded.special.before), list(loaded.special.after)) == (before, after)
    assert loaded.encode("ab<|im_end|>") == [*before, 6, 7, 4, *after]
    assert loaded.encode("ab", around=False) == [6, 7]
    assert loaded.encode_documents(["ab"])[0].tolist() == [*before, 6, 7, *(after or [eos])]
    assert Tokenizer(text).special.eos_id == eos  # without any other file


@pytest.mark.parametrize(
    ("special", "options", "end"),
    [
        (["<|endoftext|>"], {}, "<|endoftext|>"),
        (["<unk>", "<s>", "</s>"], {"unk": "<unk>"}, "</s>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {}, "<|endoftext|>"),
        (["<|begin|>", "<|eot_id|>"], {"post": "<|begin|> $A"}, "<|eot_id|>"),
        (["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"], {}, 1),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"post": "[CLS] $A [SEP]"}, "[SEP]"),
        (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], {}, "<eos>"),
    ],
)
def test_a_tokenizer_json_alone_says_which_token_ends_a_text(special, options, end):
    found = Tokenizer(definition(special, **options)).special
    assert special[found.eos_id] == (special[end] if isinstance(end, int) else end)
    assert found.stop_ids == (found.eos_id,) and not found.files


@pytest.mark.parametrize(
    "special", [[], ["<pad>"], ["<|a|>", "<|b|>"], ["</s>", "<eos>"], ["<s>", "<|eot|>", "<|im|>"]]
)
def test_where_it_does_not_the_message_names_what_to_set(special, tmp_path):
    path = folder(tmp_path, definition(special))
    with pytest.raises(UserError, match=r"tokenizer\.json: no end-of-text token .*eos_token in a tokenizer_config"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"eos_token_id": "2"}}, r"/config\.json: eos_token_id='2' is not a token id"),
        ({"config": {"eos_token_id": 2.0}}, r"config\.json: eos_token_id=2\.0"),
        ({"config": {"eos_token_id": [2, None]}}, r"config\.json: eos_token_id=\[2, None\]"),
        ({"generation_config": {"bos_token_id": True}}, r"generation_config\.json: bos_token_id=True"),
        ({"tokenizer_config": {"eos_token": 2}}, r"tokenizer_config\.json: eos_token=2 is neither"),
        ({"special_tokens_map": {"pad_token": ["x"]}}, r"special_tokens_map\.json: pad_token=\['x'\]"),
        ({"tokenizer_config": "[1]"}, r"tokenizer_config\.json: not a JSON object"),
        ({"generation_config": "{"}, r"generation_config\.json: not a readable JSON file"),
        ({"generation_config": "[" * 100_000}, r"generation_config\.json: not a readable JSON file"),
        ({"config": {"eos_token_id": [0, 1, 2, 3, 4, 5, 6, 7]}}, None),
    ],
)
def test_bad_entries_are_named(files, message, tmp_path):
    path = folder(tmp_path, definition(), **files)
    if message is None:
        assert len(Tokenizer.load(path).special.stop_ids) == 8
        path = folder(tmp_path, definition([f"<{i}>" for i in range(9)]), config={"eos_token_id": list(range(9))})
        message = r"config\.json: eos_token_id names 9 tokens that end a text, more than 8"
    with pytest.raises(UserError, match=message):
        Tokenizer.load(path)


def test_ids_and_names_that_the_tokenizer_lacks_are_left_out_with_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    config = {"eos_token": "</s>", "pad_token": "[PAD]"}
    special = find(tmp_path, tokenizer_config=config, config={"eos_token_id": [3, 99, -7]})
    assert special.stop_ids == (3,) and special.pad_id is None
    assert "has no token 99, -7" in caplog.text and "pad_token='[PAD]' is not in the vocabulary" in caplog.text


def test_tokens_that_only_the_configuration_lists_are_tokens(tmp_path):
    config = {"eos_token": "<|end|>", "added_tokens_decoder": {"8": {"content": "<|end|>", "special": True}}}
    loaded = Tokenizer.load(folder(tmp_path, definition(), tokenizer_config=config))
    assert loaded.special.eos_id == 8 and loaded.vocab_size == 9
    assert loaded.encode("a<|end|>b") == [6, 8, 7] and loaded.decode([6, 8]) == "a"
    named = Tokenizer.load(folder(tmp_path, definition(["<s>"]), tokenizer_config={"eos_token": "b"}))
    assert named.encode("ab") == [1, 2] and named.decode([1, 2]) == "a"  # named, so special


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config": {**CONFIG, "chat_template": "T"}}, "T"),
        ({"tokenizer_config": {**CONFIG, "chat_template": "T"}, "chat_template": "J"}, "J"),
        ({"tokenizer_config": {**CONFIG, "chat_template": [{"name": "x", "template": "T"}]}}, {"x": "T"}),
        ({"tokenizer_config": CONFIG}, None),
    ],
)
def test_the_chat_template(files, template, tmp_path):
    assert find(tmp_path, **files).chat_template == template


def test_more_chat_templates(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    special = find(tmp_path, tokenizer_config=CONFIG, chat_template="J")
    assert special.chat_template == {"default": "J", "rag": "R"}


def test_a_record_is_read_again(tmp_path):
    special = SpecialTokens(5, (5, 3), bos_id=2, before=(2,), files={"tokenizer_config.json": {"x": [1]}})
    special.save(tmp_path / RECORD)
    assert SpecialTokens.load(tmp_path / RECORD) == special


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_id": None}, "eos_id=None is not a token id"),
        ({"eos_id": -1}, "eos_id=-1"),
        ({"pad_id": "x"}, "pad_id='x' is neither"),
        ({"before": 1}, "before=1 is not a list"),
        ({"stop_ids": [True]}, r"stop_ids=\[True\]"),
        ({"stop_ids": list(range(9))}, "names 9 tokens"),
        ({"files": []}, r"files=\[\] is not an object"),
        ({"more": 1}, "holds .*more"),
    ],
)
def test_a_damaged_record_is_one_message(change, message, tmp_path):
    values = dataclasses.asdict(SpecialTokens(1, (1,))) | change
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        SpecialTokens.load(tmp_path / RECORD)


@pytest.mark.parametrize("marker", ["manifest.json", "checkpoints/1", "config.json"])
def test_folders_from_before_the_records_work_as_they_did(marker, tmp_path):
    """No BOS in front of what their models have never seen it before."""
    path = folder(tmp_path, definition(post="<s> $A"))
    assert Tokenizer.load(path).special.before == (2,)
    (tmp_path / marker).parent.mkdir(exist_ok=True)
    (tmp_path / marker).write_text('{"format": "mor_jax-weights-1"}')
    loaded = Tokenizer.load(path)
    assert loaded.special == SpecialTokens(3, (3,)) and loaded.encode("a") == [6]
    assert loaded.identity == loaded.hash
    loaded.save(path)
    assert Tokenizer.load(path).special == loaded.special


def test_the_identity_tells_apart_what_stands_around_documents(tmp_path):
    plain = folder(tmp_path / "plain", definition())
    begins = folder(tmp_path / "begins", definition(), tokenizer_config={**CONFIG, "bos_token": "<s>"})
    other = folder(tmp_path / "other", definition(), tokenizer_config={"eos_token": "<|eot|>"})
    identities = {spec_identity(str(path)) for path in (plain, begins, other)}
    assert len(identities) == 3 and Tokenizer.load(plain).hash in identities
    assert len({Tokenizer.load(path).hash for path in (plain, begins, other)}) == 1


def test_a_run_learns_of_its_source_what_its_corpus_does_not_say():
    bpe = train_bpe(["the cat"], 300)
    bpe.describe(SpecialTokens(5, (5, 7), bos_id=3, before=(3,), files={"generation_config.json": {}}))
    assert bpe.special == SpecialTokens(0, (5, 7), bos_id=3, files={"generation_config.json": {}})

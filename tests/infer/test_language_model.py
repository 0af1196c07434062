"""Loading a run and generating text: streaming, stop strings, and the console command."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from decode_examples import make_params, model_config

import mor_jax
from mor_jax.cli import generate
from mor_jax.config import Config, RoutingConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer, train_bpe
from mor_jax.errors import UserError
from mor_jax.infer.growing_text import GrowingText
from mor_jax.infer.language_model import LanguageModel, Speed
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import init_train_state

MODEL = model_config("expert", "middle_cycle", vocab_size=257, num_layers=5, context_length=32)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(MODEL, make_params(MODEL), Tokenizer.bytes_level())


class Letters:
    """Token i is the i-th of these pieces; some are half a character."""

    pieces = (b"ab", b"c", b"\xc3", b"\xa9", b"END")

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def may_change(self, ids):
        return False


def test_text_grows_by_whole_characters():
    text = GrowingText(Letters())
    assert [text.add(i) for i in (0, 2, 3, 1)] == ["ab", "", "é", "c"]
    assert GrowingText(Letters()).add(2, last=True) == "\ufffd"


def test_a_stop_string_is_held_back_and_cut():
    text = GrowingText(Letters(), stop=["bc", "ENDc"])
    assert [text.add(i) for i in (0, 0, 4, 0)] == ["a", "ba", "b", "ENDa"]
    assert text.add(1) == "" and text.stopped and text.text == "ababENDa"
    assert text.add(0) == ""
    ends = GrowingText(Letters(), stop=["bc"])
    assert ends.add(0, last=True) == "ab"


class Words:
    """Token i is the i-th of these; the text's first space vanishes, and so do special tokens."""

    pieces = (" the", " cat", "s", "", " \u00e9", "END")

    def __init__(self):
        self.most = 0

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")

    def may_change(self, ids):
        return False


@pytest.mark.parametrize("seed", range(5))
def test_growing_text_is_the_text_and_decodes_few_tokens_at_a_time(seed):
    rng = np.random.default_rng(seed)
    bpe = train_bpe(["the caf\u00e9 na\u00efve \U0001f600 " * 9], 280)
    for tokenizer, ids in ((Words(), rng.integers(0, 6, 200)), (bpe, rng.integers(0, 280, 200))):
        ids = ids.tolist()
        text = GrowingText(tokenizer, stop=["no such text"])
        pieces = [text.add(i, last=nth == 199) for nth, i in enumerate(ids)]
        assert "".join(pieces) == text.text == tokenizer.decode(ids)
    words = Words()
    text = GrowingText(words)
    for i in [3, 0, 3, 1, 2, 4, 3, 3, 5] * 50:
        text.add(i)
    assert words.most <= 6


def test_a_stop_string_is_found_across_tokens():
    text = GrowingText(Words(), stop=["catsEND"])
    shown = "".join(text.add(i) for i in (0, 1, 2, 1, 2, 5))
    assert shown == text.text == "the cats " and text.stopped


def test_generation_streams_what_it_returns(model):
    arguments = {"max_tokens": 9, "temperature": 1.0, "seed": 3}
    completions = model.generate(["first", "", "a third"], **arguments)
    texts = [""] * 3
    for piece in model.stream(["first", "", "a third"], **arguments):
        texts[piece.prompt] += piece.text
    assert [c.text for c in completions] == texts
    for completion in completions:
        assert len(completion.tokens) == len(completion.depths) == len(completion.log_probabilities)
        assert completion.finish == "length" and len(completion.tokens) == 9


def test_a_stop_string_ends_a_completion_and_frees_its_place(model):
    (whole,) = model.generate("stop here", max_tokens=12, temperature=1.0, seed=1)
    stop = whole.text[4]
    (cut,) = model.generate("stop here", max_tokens=12, temperature=1.0, seed=1, stop=[stop])
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    several = whole.text[4:7]  # one string to end at, not three characters
    (cut,) = model.generate("stop here", max_tokens=12, temperature=1.0, seed=1, stop=several)
    assert cut.text == whole.text[: whole.text.index(several)]
    assert not any(engine.busy for engine in model._engines.values())


def test_a_reader_may_leave(model):
    for _ in model.stream("gone", max_tokens=20):
        break
    assert not any(engine.busy for engine in model._engines.values())


def test_impossible_wishes_are_refused(model):
    for arguments, message in (
        ({"max_tokens": 40}, "make 44 tokens, more than max_length=32"),
        ({"max_length": 0}, "more than max_length=0"),
        ({"temperature": -1.0}, "temperature=-1.0 is outside"),
        ({"top_p": -0.1}, "top_p=-0.1 is outside"),
        ({"max_depth": 0}, "max_depth=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            model.stream("text", **{"max_tokens": 4, **arguments})  # at once: nothing asks for a token


def test_speed_leaves_out_what_came_with_the_first_dispatch():
    speed = Speed(begin=10.0)
    for seen in (12.0, 12.0, 12.0, 13.0, 14.0):
        speed.count(seen)
    assert speed.summary() == "5 tokens: 3 after 2.00 s, then 1.0 tokens/s"
    at_once = Speed(begin=10.0)
    at_once.count(11.5)
    at_once.count(11.5)
    assert at_once.summary() == "2 tokens: 2 after 1.50 s"


def test_streams_that_were_opened_together_do_not_mix(model):
    wanted = [c.tokens for c in (model.generate("one", max_tokens=5) + model.generate("two", max_tokens=5))]
    first, second = (model.stream(prompt, max_tokens=5) for prompt in ("one", "two"))
    begun = next(first).token
    assert [piece.token for piece in second] == wanted[1]
    assert [begun, *(piece.token for piece in first)] == wanted[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    config = Config(preset="tiny", model=MODEL)
    config_io.save(config, folder / "config.json")
    Tokenizer.bytes_level().save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(init_train_state(config, make_mesh(config.mesh, jax.devices()[:1])), data_step=0, data_hash="tiny")
    checkpoints.close()
    return folder


def test_a_run_generates_from_python_and_from_the_command_line(run, capsys, monkeypatch):
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)
    (completion,) = mor_jax.load(run).generate("once", max_tokens=5)
    assert generate.run([str(run), "--prompt", "once", "--max-tokens", "5", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "prompt": "once", "text": completion.text, "tokens": completion.tokens, "depths": completion.depths,
        "log_probabilities": pytest.approx(completion.log_probabilities), "finish": "length",
    }  # fmt: skip
    assert "5 tokens: 5 after" in captured.err
    assert generate.run([str(run), "--prompt", "once", "--max-tokens", "5", "--show-depth"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("once" + completion.text) and shown.rstrip().endswith(f"|{completion.depths[-1]}")


def test_boundaries_decide_the_depths_of_the_command_line(run, capsys, monkeypatch):
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)
    recursions = MODEL.recursion.num_recursions
    for boundary, depth in ((-1e9, recursions), (1e9, 1)):
        boundaries = ["--boundaries", *[str(boundary)] * recursions]
        assert generate.run([str(run), "--prompt", "once", "--max-tokens", "3", "--json", *boundaries]) == 0
        assert json.loads(capsys.readouterr().out)["depths"] == [depth] * 3
    with pytest.raises(UserError, match=r"boundaries=\(0.0,\) has 1 entries for num_recursions"):
        generate.run([str(run), "--prompt", "once", "--boundaries", "0"])
    plain = dataclasses.replace(MODEL, routing=RoutingConfig())
    with pytest.raises(UserError, match=r"boundaries=\(0.0, 1.0\) belong to expert-choice, not routing.kind='none'"):
        LanguageModel(plain, make_params(plain), Tokenizer.bytes_level(), boundaries=(0.0, 1.0))


def test_keys_and_values_in_int8_are_a_flag(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(LanguageModel, "stream", lambda *_, **arguments: seen.update(arguments) or iter(()))
    assert generate.run([str(run), "--prompt", "once", "--kv-dtype", "int8"]) == 0
    assert seen["kv_dtype"] == "int8"


def test_keys_and_values_in_int8_take_fewer_bytes(model):
    for kv_dtype in ("model", "int8"):
        model.stream("some text", max_tokens=3, kv_dtype=kv_dtype)
    plain, int8 = (engine.measure().reserved for engine in list(model._engines.values())[-2:])
    head_dim = MODEL.head_dim
    assert plain * (head_dim + 2) == int8 * head_dim * 4


def test_devices_that_do_not_divide_the_model_are_refused(run):
    with pytest.raises(UserError, match=r"model.vocab_size=257 is not divisible by mesh.tensor=2"):
        generate.run([str(run), "--prompt", "once", "--mesh.tensor", "2"])


@pytest.mark.slow
def test_the_command_line_generates_on_several_devices(run, capsys, monkeypatch):
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)
    prompts, outs = ("once", "twice", "thrice"), []
    for mesh in ([], ["--mesh.data", "2"]):
        assert generate.run([str(run), "--prompt", *prompts, "--max-tokens", "5", "--json", *mesh]) == 0
        outs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [one["prompt"] for one in outs[0]] == list(prompts)
    for one, other in zip(*outs, strict=True):
        assert one["tokens"] == other["tokens"] and one["depths"] == other["depths"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        mor_jax.load(tmp_path / "absent")


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    padded = dataclasses.replace(MODEL, vocab_size=260, tie_embeddings=False)
    params = jax.tree.map(np.array, make_params(padded))
    params["head"]["kernel"][:, 258], params["head"]["kernel"][:, 259] = 9.0, -9.0  # one of them is always the largest
    model = LanguageModel(padded, params, Tokenizer.bytes_level())
    for arguments in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}):
        (completion,) = model.generate("some text", max_tokens=9, **arguments)
        assert completion.tokens and max(completion.tokens) < 257


def test_any_end_token_ends_a_completion_and_what_the_tokenizer_adds_is_read(model):
    tokenizer = Tokenizer.bytes_level()
    (whole,) = model.generate("end", max_tokens=12, temperature=1.0, seed=2)
    ends = (whole.tokens[5], 256, whole.tokens[3])
    tokenizer.special = dataclasses.replace(tokenizer.special, stop_ids=ends)
    other = LanguageModel(MODEL, make_params(MODEL), tokenizer)
    (ended,) = other.generate("end", max_tokens=12, temperature=1.0, seed=2)
    first = next(i for i, token in enumerate(whole.tokens) if token in ends)
    assert ended.tokens == whole.tokens[: first + 1] and ended.finish == "stop"
    tokenizer.special = dataclasses.replace(tokenizer.special, before=(1, 2), bos_id=1)
    (begun,) = other.generate("end", max_tokens=3)
    (spelled,) = model.generate("\x01\x02end", max_tokens=3)
    assert begun.tokens == spelled.tokens

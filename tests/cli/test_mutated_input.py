"""Generated bad input: whatever a file holds, a command ends soon, with one message that names it, or works."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pytest
import yaml
import zstandard
from mutations import damaged_bytes, damaged_json, damaged_safetensors
from pyarrow import parquet

from conftest import CONTEXT, Mor, Outcome
from mor_jax.cli import generate
from mor_jax.config import Config, DataConfig, ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.config import io as config_io
from mor_jax.data.pipeline import make_dataset
from mor_jax.data.tokenizer import Tokenizer, train_bpe
from mor_jax.errors import UserError
from mor_jax.evaluate.tasks.local import read_set
from mor_jax.interop import convert
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.sources import open_model
from mor_jax.model.transformer import init_params
from mor_jax.runs.metrics import read_metrics

_SECONDS = 10
_MODEL = ModelConfig(
    vocab_size=257, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8, context_length=8,
    dtype="float32",
)  # fmt: skip
_MOR = dataclasses.replace(
    _MODEL, num_layers=4, recursion=RecursionConfig(2, "middle_cycle"), routing=RoutingConfig("expert")
)
_ROWS = [{"text": f"document {i} of a few words", "id": i, "meta": {"tags": ["a", None]}} for i in range(6)]
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
_PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}


class HangError(BaseException):
    """No ``Exception``: nothing may take it for a fault of the input."""


class Place(NamedTuple):
    """Valid folders, and where a case writes."""

    corpus: Path
    hf: Path
    ours: Path
    official: Path
    indexed: Path
    """As ``hf``, with an index of shards, a tokenizer.json and what says its special tokens."""
    work: Path


Case = Callable[[Random, Place], tuple[Path, Any]]
"""Writes damaged input in ``work``; returns its path and what reads it: the arguments of ``mor``, or a function."""


@pytest.fixture(scope="module")
def valid(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A prepared corpus, a Hugging Face folder and converted weights, all tiny."""
    folder = tmp_path_factory.mktemp("valid")
    params = _params(_MODEL)
    (folder / "ours").mkdir()
    weights.save(folder / "ours", _MODEL, params, Tokenizer.bytes_level(), origin="a test")
    convert.write(open_model(folder / "ours"), "hf", folder / "hf")
    (folder / "mor").mkdir()
    params = _params(_MOR)
    weights.save(folder / "mor", _MOR, params, None, origin="a test")
    convert.write(open_model(folder / "mor"), "official", folder / "official")
    return Place(corpus, folder / "hf", folder / "ours", folder / "official", _indexed(folder / "hf"), folder / "work")


def _params(model: ModelConfig) -> Any:
    return jax.tree.map(np.asarray, jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))


def _indexed(hf: Path) -> Path:
    folder = Path(shutil.copytree(hf, hf.with_name("indexed")))
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = json.loads(shard.read_bytes()[8:].partition(b"}}")[0] + b"}}").keys() - {"__metadata__"}
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(sorted(names), shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    train_bpe(["a few words of text"] * 9, 257).save(folder / "tokenizer.json")
    end = "<|endoftext|>"
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 1]}))
    tokens = {"eos_token": end, "bos_token": {"content": end}, "add_bos_token": True, "chat_template": "{{ a }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def _rows(random: Random) -> bytes:
    """JSON lines, one of them damaged."""
    lines = [json.dumps(row) for row in _ROWS]
    place = random.randrange(len(lines))
    lines[place] = damaged_json(random, _ROWS[place])
    return "\n".join(lines).encode()


def _json_or_bytes(random: Random, data: bytes) -> bytes:
    if random.random() < 0.25:
        return damaged_bytes(random, data)
    return damaged_json(random, json.loads(data)).encode()


def _yaml_or_bytes(random: Random, data: bytes) -> bytes:
    """JSON is YAML, too."""
    if random.random() < 0.25:
        return damaged_bytes(random, data)
    return damaged_json(random, yaml.safe_load(data)).encode()


def _packed(suffix: str) -> Callable[[Random], bytes]:
    pack = _PACK[suffix]
    return lambda random: pack(_rows(random)) if random.random() < 0.3 else damaged_bytes(random, pack(_LINES))


def _table(random: Random) -> bytes:
    """A table whose text column is of another type now and then."""
    texts = [row["text"] for row in _ROWS] * 50
    encoded = [text.encode() for text in texts]
    columns = (
        lambda: pa.array([None, *texts[1:]]),
        lambda: pa.array(range(len(texts))),
        lambda: pa.array(encoded),
        lambda: pa.array([b"\xff", *encoded[1:]]).view(pa.string()),
        lambda: pa.array([[text] for text in texts]),
        lambda: pa.nulls(len(texts)),
        lambda: pa.array(texts).cast(pa.dictionary(pa.int32(), pa.string())),
    )
    column = random.choice(columns)() if random.random() < 0.4 else pa.array(texts)
    options: Any = {"compression": random.choice(("none", "snappy", "zstd", "gzip")), "row_group_size": 100}
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"id": pa.array(range(len(texts))), "text": column}), buffer, **options)
    return buffer.getvalue() if random.random() < 0.3 else damaged_bytes(random, buffer.getvalue())


def _metrics(random: Random) -> bytes:
    lines = b"".join(b'{"step": %d, "loss": 1.5, "tokens_per_depth": [1, 2]}\n' % step for step in range(1, 4))
    return damaged_bytes(random, lines) if random.random() < 0.5 else lines + _rows(random) + b"\n"


def _evalset(random: Random) -> bytes:
    row = {"query": "one or two?", "choices": ["one", "two"], "gold": 1}
    lines = [json.dumps(row), damaged_json(random, row), json.dumps(row)]
    return gzip.compress("\n".join(lines).encode(), mtime=0) if random.random() < 0.7 else damaged_bytes(random, _LINES)


def _prompts(path: Path) -> None:
    options = generate.GenerateArguments(Path("nowhere"), file=path)
    Tokenizer.bytes_level().encode_batch(generate._prompts(options))


def _batch(folder: Path) -> None:
    config = DataConfig(source=str(folder))
    make_dataset(config, context_length=CONTEXT, vocab_size=257, batch_size=2, split="validation").batch(0)


def _prepared(name: str, make: Callable[[Random], bytes]) -> Case:
    def case(random: Random, place: Place) -> tuple[Path, Any]:
        path = place.work / name
        path.write_bytes(make(random))
        flags = ("--tokenizer", "bytes", "--context-length", "16", "--validation-share", "0")
        return path, ("prepare", path, "--out", place.work / "out", *flags)

    return case


def _read(name: str, make: Callable[[Random], bytes], read: Callable[[Path], object]) -> Case:
    def case(random: Random, place: Place) -> tuple[Path, Any]:
        path = place.work / name
        path.write_bytes(make(random))
        return path, lambda: read(path)

    return case


def _within(source: str, name: str, damage: Callable[[Random, bytes], bytes], read: Any = None) -> Case:
    """One damaged file of a folder, which is converted, unless ``read`` reads it."""

    def case(random: Random, place: Place) -> tuple[Path, Any]:
        folder = Path(shutil.copytree(getattr(place, source), place.work / source))
        path = folder / name
        path.write_bytes(damage(random, path.read_bytes()))
        return path, (lambda: read(folder)) if read else ("convert", folder, "--out", place.work / "out")

    return case


def _run_config(random: Random) -> bytes:
    values = config_io.to_dict(Config())
    if random.random() < 0.3:
        values["train"]["tensorboard"] = True  # as before there were trackers
    return _json_or_bytes(random, json.dumps(values).encode())


_CASES: dict[str, Case] = {
    "lines": _prepared("rows.jsonl", lambda random: random.choice((_rows(random), damaged_bytes(random, _LINES)))),
    "array": _prepared("rows.json", lambda random: damaged_json(random, _ROWS).encode()),
    "text": _prepared("text.txt", lambda random: damaged_bytes(random, "ein größerer Text\n\n".encode() * 30)),
    **{suffix: _prepared(f"rows.jsonl{suffix}", _packed(suffix)) for suffix in _PACK},
    "parquet": _prepared("table.parquet", _table),
    "safetensors": _within("hf", "model.safetensors", damaged_safetensors),
    "our safetensors": _within("ours", "model.safetensors", damaged_safetensors),
    "Hugging Face's config": _within("hf", "config.json", _json_or_bytes),
    "our config": _within("ours", "config.json", _json_or_bytes, weights.read_config),
    "release's config": _within("official", "config.json", _json_or_bytes),
    "release's YAML": _within("official", "config.yaml", _yaml_or_bytes),
    "index": _within("indexed", "model.safetensors.index.json", _json_or_bytes),
    "tokenizer": _within("indexed", "tokenizer.json", _json_or_bytes),
    "generation config": _within("indexed", "generation_config.json", _json_or_bytes),
    "tokenizer config": _within("indexed", "tokenizer_config.json", _json_or_bytes),
    "a run's config": _read(
        "config.json",
        _run_config,
        lambda path: config_io.load(Config, path),
    ),
    "manifest": _within("corpus", "manifest.json", _json_or_bytes, _batch),
    "metrics": _read("metrics.jsonl", _metrics, read_metrics),
    "evaluation set": _read("set.jsonl.gz", _evalset, lambda path: read_set(path, ("query", "choices", "gold"))),
    "prompts": _read("prompts.txt", lambda random: damaged_bytes(random, "größer\nzwei\n".encode() * 3), _prompts),
}


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _run(mor: Mor, read: Any) -> Outcome:
    """Run ``mor``, or call a function as ``mor`` would."""
    with _no_hang():
        if isinstance(read, tuple):
            return mor(*read)
        try:
            read()
        except UserError as error:
            return Outcome(2, "", f"mor : {error}\n")
        return Outcome(0, "", "")


def _try(mor: Mor, case: Case, seed: int, valid: Place) -> int:
    """Check one case, and return its exit code."""
    shutil.rmtree(valid.work, ignore_errors=True)
    valid.work.mkdir()
    path, read = case(Random(seed), valid)
    outcome = _run(mor, read)
    assert outcome.code in (0, 2) and "Traceback" not in outcome.err, outcome
    if outcome.code == 2:
        [message] = [line for line in outcome.err.splitlines() if line]
        assert message.startswith("mor ") and len(message) < 2000, message
        assert str(path) in message or str(path.parent) in message, message
        assert outcome.out == "" and not list(valid.work.glob("out*")), outcome
    return outcome.code


def _try_all(mor: Mor, name: str, seeds: range, valid: Place) -> None:
    codes = []
    for seed in seeds:
        try:
            codes.append(_try(mor, _CASES[name], seed, valid))
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
    known = name in ("generation config", "tokenizer config")  # wrong kinds of what they say are passed over
    assert known or 2 in codes, "nothing was refused: is this input read at all?"


@pytest.mark.parametrize("name", _CASES)
def test_damaged_input(name, mor: Mor, valid):
    _try_all(mor, name, range(9), valid)  # 207 cases in all


@pytest.mark.slow
@pytest.mark.parametrize("name", _CASES)
def test_more_damaged_input(name, mor: Mor, valid):
    _try_all(mor, name, range(1000, 1090), valid)  # 2,070 cases in all

"""Batches are a pure function of configuration and step, whatever the hosts, workers and restarts."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data.manifest import MANIFEST, read_manifest
from mor_jax.data.pipeline import NoHeldOutText, make_dataset
from mor_jax.data.prepare import prepare
from mor_jax.errors import UserError

CONTEXT = 32  # of the corpus fixtures
BATCH = 8


def _open(source, batch_size=BATCH, context_length=CONTEXT, vocab_size=257, workers=0, weights=None, seed=0, **options):
    config = DataConfig(source=str(source), workers=workers, weights=weights, seed=seed)
    sizes = {"batch_size": batch_size, "context_length": context_length, "vocab_size": vocab_size}
    return make_dataset(config, **sizes, **options)


def _take(dataset, count):
    batches = [next(dataset) for _ in range(count)]
    dataset.close()
    return batches


def _assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for name in ("tokens", "segment_ids", "positions"):
            np.testing.assert_array_equal(one[name], other[name])


def test_shapes_and_facts(corpus):
    dataset = _open(corpus)
    for values in _take(dataset, 1)[0].values():
        assert values.shape == (BATCH, CONTEXT + 1) and values.dtype == np.int32
    manifest = read_manifest(corpus)
    train = manifest.totals("train")
    assert train is not None and dataset.rows == train.rows and dataset.steps is None
    assert dataset.bytes_per_token == pytest.approx(train.bytes_per_token)
    assert dataset.hash == manifest.hash and dataset.tokenizer.vocab_size == 257


def test_an_epoch_holds_every_row_once_and_the_next_is_shuffled_anew(corpus):
    dataset = _open(corpus, batch_size=1)
    rows = [batch["tokens"].tobytes() for batch in _take(dataset, 2 * dataset.rows)]
    first, second = rows[: dataset.rows], rows[dataset.rows :]
    stored = sorted(first)
    assert stored == sorted(second) and first != second
    assert first != [b["tokens"].tobytes() for b in _take(_open(corpus, batch_size=1, seed=1), dataset.rows)]


@pytest.mark.parametrize("step", [0, 3, 17])
def test_resume_equals_straight_through(corpus, step):
    straight = _take(_open(corpus), step + 4)[step:]
    _assert_same(straight, _take(_open(corpus, start_step=step), 4))
    moved = _open(corpus)
    _take(moved, 2)
    moved.step = step
    _assert_same(straight, _take(moved, 4))
    assert moved.step == step + 4
    _assert_same(straight[:1], [moved.batch(step)])


def _share(host: int, hosts: int) -> range:
    return range(host * BATCH // hosts, (host + 1) * BATCH // hosts)


@pytest.mark.parametrize("rows", [[0, 3, 4], [1, 6, 7, 2]])
def test_a_host_reads_any_rows_of_the_same_batches(corpus, rows):
    whole = _take(_open(corpus, start_step=1), 3)
    mine = _take(_open(corpus, start_step=1, rows=rows), 3)
    _assert_same([{name: batch[name][rows] for name in batch} for batch in whole], mine)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_the_same_global_batches(corpus, hosts, split):
    whole = _take(_open(corpus, split=split), 3)
    parts = [_take(_open(corpus, split=split, rows=_share(i, hosts)), 3) for i in range(hosts)]
    joined = [{name: np.concatenate([p[i][name] for p in parts]) for name in whole[i]} for i in range(3)]
    _assert_same(whole, joined)


def test_workers_do_not_change_the_order(corpus):
    _assert_same(_take(_open(corpus, start_step=2), 5), _take(_open(corpus, start_step=2, workers=2), 5))


def test_validation_is_one_padded_pass_in_order(corpus):
    dataset = _open(corpus, split="validation")
    batches = list(dataset)
    dataset.close()
    assert dataset.steps == len(batches) == -(-dataset.rows // BATCH)
    segment_ids = np.concatenate([batch["segment_ids"] for batch in batches])
    assert (segment_ids[: dataset.rows, 0] == 1).all() and not segment_ids[dataset.rows :].any()
    totals = read_manifest(corpus).totals("validation")
    assert totals is not None and (segment_ids > 0).sum() == totals.tokens
    _assert_same(batches, list(_open(corpus, split="validation", workers=0, seed=9)))


def test_shorter_contexts_read_rows_in_pieces(corpus):
    whole = _open(corpus, split="validation", batch_size=1)
    pieces = _open(corpus, split="validation", batch_size=1, context_length=CONTEXT // 4)
    assert pieces.rows == 4 * whole.rows
    for i, row in enumerate(whole):
        parts = [next(pieces) for _ in range(4)]
        targets = np.concatenate([part["tokens"][0, 1:] for part in parts])
        np.testing.assert_array_equal(targets, row["tokens"][0, 1:], err_msg=f"row {i}")
        assert all(part["positions"][0, 0] == 0 for part in parts)


def test_mixture_keeps_its_weights_and_its_hosts(corpus, other_corpus):
    source = f"{corpus},{other_corpus}"
    batches = _take(_open(source, weights=(3.0, 1.0)), 20)
    rows = [bytes(t for t in row if t < 256) for batch in batches for row in batch["tokens"]]
    assert sum(b"lore" in row or b"orem" in row for row in rows) == pytest.approx(120, abs=4)
    parts = [_take(_open(source, weights=(3.0, 1.0), rows=_share(i, 2)), 20) for i in range(2)]
    joined = [{name: np.concatenate([p[i][name] for p in parts]) for name in batches[0]} for i in range(20)]
    _assert_same(batches, joined)
    _assert_same(batches[7:9], _take(_open(source, weights=(3.0, 1.0), start_step=7), 2))
    assert _open(source, split="validation").rows == sum(
        _open(part, split="validation").rows for part in (corpus, other_corpus)
    )


@pytest.fixture
def broken(corpus, tmp_path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "broken"))


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-7])


def _overwrite(folder: Path) -> None:
    shard = next(folder.glob("train-*"))
    shard.write_bytes(b"\1" * shard.stat().st_size)


def _rename(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"file": "', '"file": "../', 1))


def _swap(folder: Path) -> None:
    one, other = sorted(folder.glob("train-*"))[:2]
    one.write_bytes(other.read_bytes())


def _edit(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["rows"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("train-*")).unlink(), "is missing, but manifest.json lists it"),
        (_truncate, "bytes, but manifest.json says"),
        (_overwrite, "truncated or not an ArrayRecord file"),
        (_swap, "but manifest.json says"),
        (_rename, "no plain file name"),
        (_edit, "totals or hash disagree"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not a readable configuration"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a prepared corpus"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "not a readable tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer definition"),
    ],
)
def test_damage_is_found(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message):
        _open(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 64}, "context_length=64 is longer than the 32 tokens"),
        ({"context_length": 12}, "context_length=12 does not divide the 32 tokens"),
        ({"vocab_size": 200}, "vocab_size=200 is less than the 257"),
        ({"rows": [7, 8]}, r"rows=\[7, 8\] are outside batch_size=8"),
        ({"rows": []}, r"rows=\[\] are outside"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"split": "test"}, "split='test'"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_bad_requests(corpus, options, message):
    with pytest.raises(UserError, match=message):
        _open(corpus, **options)


def test_unknown_sources(tmp_path, corpus):
    for source, message in ((tmp_path / "none", "no such folder"), (f"{corpus},", "empty entry")):
        with pytest.raises(UserError, match=message):
            _open(source)
    config = DataConfig(source=str(corpus), tokenizer="bpe:300")
    with pytest.raises(UserError, match="leave it 'auto'"):
        make_dataset(config, context_length=CONTEXT, vocab_size=257, batch_size=1)


def test_a_corpus_without_validation(tmp_path, corpus):
    text = str(corpus.parent / "text.jsonl")
    made = prepare([text], tmp_path / "out", tokenizer="bytes", context_length=CONTEXT, validation_share=0.0)
    with pytest.raises(NoHeldOutText, match="has no validation split"):
        _open(made, split="validation")
    _assert_same(list(_open(f"{made},{corpus}", split="validation")), list(_open(corpus, split="validation")))


def test_commas_in_paths(tmp_path, corpus, other_corpus):
    odd = shutil.copytree(corpus, tmp_path / "a,b" / "corpus,c")
    assert _open(odd).hash == _open(corpus).hash
    mixture = _open(f"{odd}, {other_corpus},{odd}", weights=(1.0, 2.0, 3.0))
    assert mixture.hash == _open(f"{corpus},{other_corpus},{corpus}").hash
    for source in (odd, f"{odd},{other_corpus}"):
        with pytest.raises(UserError, match=r"data\.weights=\(1.0, .*has not one entry for each of [12] sources"):
            _open(source, weights=(1.0, 2.0, 3.0) if source != odd else (1.0, 2.0))


def test_mixtures_need_one_tokenizer(tmp_path, corpus):
    text = str(corpus.parent / "text.jsonl")
    made = prepare([text], tmp_path / "out", tokenizer="bpe:300", context_length=CONTEXT)
    with pytest.raises(UserError, match="different tokenizers"):
        _open(f"{corpus},{made}")


def test_a_vocabulary_may_be_larger_than_the_tokenizers(corpus):
    assert _open(corpus, vocab_size=384).tokenizer.vocab_size == 257


def test_documents_begin_and_end_as_the_tokenizer_says(tmp_path, corpus):
    text = str(corpus.parent / "text.jsonl")
    kinds = Path(__file__).parent.parent / "fixtures" / "tokenizers"
    made = [tmp_path / "begins", tmp_path / "bare"]
    (tmp_path / "bare.json").write_bytes((kinds / "smollm2" / "tokenizer.json").read_bytes())
    for out, spec in zip(made, (kinds / "llama2" / "tokenizer.json", tmp_path / "bare.json"), strict=True):
        prepare([text], out, tokenizer=str(spec), context_length=CONTEXT)
    (batch,) = _take(_open(made[0], vocab_size=512), 1)
    begins = (np.diff(batch["segment_ids"], axis=1) > 0) & (batch["segment_ids"][:, 1:] > 0)
    assert begins.any()
    assert set(batch["tokens"][:, 1:][begins]) == {1} and set(batch["tokens"][:, :-1][begins]) == {2}  # </s>, <s>
    assert _open(made[0], vocab_size=512).tokenizer.special.before == (1,)
    prepare([text], tmp_path / "chat", tokenizer=str(kinds / "smollm2" / "tokenizer.json"), context_length=CONTEXT)
    with pytest.raises(UserError, match="other special tokens around documents"):
        _open(f"{made[1]},{tmp_path / 'chat'}", vocab_size=512)


def test_embedded_is_prepared_once(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()  # a saved `embedded` means the built-in one even so
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source="embedded", tokenizer="bytes", cache=str(tmp_path / "cache"))
    options: Any = {"context_length": 64, "vocab_size": 257, "batch_size": 4}
    first = make_dataset(config, **options)
    [folder] = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = make_dataset(dataclasses.replace(config, source="builtin:embedded"), split="validation", **options)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before and folder.name.startswith(
        "embedded-"
    )
    assert first.hash == again.hash and 0.03 < again.rows / (again.rows + first.rows) < 0.12
    assert "the" in first.tokenizer.decode(first.batch(0)["tokens"].ravel())

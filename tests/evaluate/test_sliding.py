"""Sliding windows against literal tables and against the trainer's validation; the cap on the passes."""

import dataclasses
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import Bytes, HeldOut, T, config, params, weights

from mor_jax.config import PLAIN, RelaxationConfig, ResolvedPerf
from mor_jax.data.packing import Row, expand_row
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.evaluate.passes import batch_trace
from mor_jax.evaluate.sliding import sliding_losses, text_stream, windows
from mor_jax.evaluate.text_loss import read_streams, text_summary
from mor_jax.evaluate.validation import validation_losses
from mor_jax.model.forward import forward
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import init_params

DOCUMENTS = [np.random.default_rng(i).integers(0, 256, length) for i, length in enumerate((20, 33, 11))]
STREAM = text_stream([np.append(document, 256) for document in DOCUMENTS], [256])


def test_documents_are_joined_as_in_training():
    stream = text_stream([np.array([1, 2, 9]), np.array([3, 9])], [9])
    assert stream.tokens.tolist() == [9, 1, 2, 9, 3, 9] and stream.starts.tolist() == [0, 1, 4]
    assert len(STREAM.tokens) == 1 + 21 + 34 + 12


def test_texts_begin_with_bos_where_the_tokenizer_adds_it(tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    kinds = Path(__file__).parent.parent / "fixtures" / "tokenizers"
    for kind, begin in (("llama2", [1]), ("gpt2", [355])):
        tokenizer = Tokenizer.load(kinds / kind / "tokenizer.json")
        streams, _ = read_streams([tmp_path / "a.txt"], tokenizer)
        stream = streams["a.txt"]
        inner = tokenizer.encode("the cat", around=False)
        assert stream.tokens.tolist() == [*begin, *inner, tokenizer.eos_id]
        assert stream.starts.tolist() == ([0] if tokenizer.special.before else [0, 1])


@pytest.mark.parametrize(
    ("length", "stride", "table"),
    [  # (offset, first target that counts, last) with a context of 4
        (9, 4, [(0, 0, 4), (4, 0, 4)]),
        (9, 2, [(0, 0, 4), (2, 2, 4), (4, 2, 4)]),
        (8, 4, [(0, 0, 4), (3, 1, 4)]),  # the last one is moved back to be full
        (8, 3, [(0, 0, 4), (3, 1, 4)]),
        (4, 4, [(0, 0, 3)]),
        (2, 1, [(0, 0, 1)]),
    ],
)
def test_windows_count_every_target_once(length, stride, table):
    stream = Row(np.arange(length), np.array([0]))
    found = list(windows(stream, 4, stride))
    assert [(int(w.row.tokens[0]), w.first, len(w.row.tokens) - 1) for w in found] == table
    scored = np.concatenate([w.row.tokens[1:][w.first :] for w in found])
    assert scored.tolist() == list(range(1, length))


@pytest.mark.parametrize(("kind", "sharing"), [("expert", "cycle"), ("token", "cycle"), ("none", "none")])
def test_without_overlap_it_is_the_trainers_validation(kind, sharing):
    # full seats: token-choice is validated under `gather`, which may drop tokens, and scored without drops
    cfg = config(kind, sharing=sharing, capacities=(1.0, 1.0) if kind == "token" else None)
    model = weights(cfg, jnp.zeros(2))
    found = sliding_losses(model, cfg.perf, {"a": STREAM}, Bytes(), stride=T, batch_rows=2)["sources"]
    full = [w.row for w in windows(STREAM, T, T) if w.first == 0]
    rows = [expand_row(row, T + 1) for row in full]
    held_out = HeldOut({n: np.stack([r[n] for r in rows]) for n in rows[0]})
    losses = validation_losses(model, cfg.perf, held_out, len(rows))
    whole = text_stream([], [256])._replace(tokens=STREAM.tokens[: len(full) * T + 1], starts=STREAM.starts)
    cut = sliding_losses(model, cfg.perf, {"a": whole}, Bytes(), stride=T, batch_rows=2)["sources"]["a"]
    assert cut["tokens"] == losses["validation_tokens"] and cut["bytes"] == losses["validation_bytes"]
    names = ("topk_nll", "threshold_nll", "topk_bits_per_byte") if kind == "expert" else ("nll",)
    for name in names:
        key = f"validation_{name}" if kind != "token" else "validation_topk_nll"
        np.testing.assert_allclose(cut[name], losses[key], rtol=1e-5)
    assert found["all"] == found["a"] and found["a"]["tokens"] == len(STREAM.tokens) - 1


def test_overlap_changes_the_context_but_not_what_is_counted():
    cfg = config()
    by_stride = {
        stride: sliding_losses(weights(cfg), cfg.perf, {"a": STREAM, "b": STREAM}, Bytes(), stride=stride, batch_rows=2)
        for stride in (T, 5)
    }
    for found in by_stride.values():
        assert found["sources"]["all"]["tokens"] == 2 * (len(STREAM.tokens) - 1)
        assert found["sources"]["all"]["bytes"] == 2 * sum(len(d) for d in DOCUMENTS)
        np.testing.assert_allclose(found["sources"]["all"]["topk_nll"], found["sources"]["a"]["topk_nll"])
    within = sliding_losses(
        weights(cfg), cfg.perf, {"a": STREAM}, Bytes(), stride=T, batch_rows=2, within_documents=True
    )
    inner = within["sources"]["a"]  # without the first token of each: what masked documents count
    assert (inner["tokens"], inner["bytes"]) == (sum(map(len, DOCUMENTS)), sum(len(d) - 1 for d in DOCUMENTS))
    assert by_stride[T]["sources"]["a"]["threshold_nll"] != by_stride[5]["sources"]["a"]["threshold_nll"]
    assert "threshold_bits_per_byte" in text_summary(by_stride[5])
    with pytest.raises(UserError, match=f"stride=17 is outside 1..context_length={T}"):
        list(windows(STREAM, T, 17))


def test_texts_are_read_by_source(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [{"text": "one", "source": "x"}, {"text": "two", "source": "y"}, {"text": "three", "source": "x"}]
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.txt").write_text("plain")
    streams, sizes = read_streams([path, tmp_path / "b.txt"], Tokenizer.bytes_level())
    assert sizes == {"x": 8, "y": 3, "b.txt": 5}
    assert {name: len(stream.tokens) for name, stream in streams.items()} == {"x": 1 + 4 + 6, "y": 5, "b.txt": 7}


def _depths(model, perf=PLAIN):
    row: dict[str, Any] = {
        name: value[None] for name, value in expand_row(Row(STREAM.tokens[:T], np.array([0])), T).items()
    }
    rows = Rows(row["tokens"], row["positions"], row["segment_ids"])
    trace = batch_trace(model, perf, "threshold", rows, jax.random.key(0))
    assert trace is not None
    return np.asarray(trace.depth_BT)[0]


def test_a_cap_cuts_the_deeper_passes_and_changes_no_other_decision():
    cfg = config(num_recursions=3)
    full = _depths(weights(cfg))
    assert set(full) >= {2, 3}  # otherwise the caps below cut nothing
    for cap in (1, 2, 3):
        depths = _depths(cap_depth(weights(cfg), cap))
        assert depths.tolist() == np.minimum(full, cap).tolist()


@pytest.mark.parametrize("kind", ["expert", "none"])
def test_a_cap_keeps_what_the_first_passes_do_not_share(kind):
    """Norms, low-rank updates and encodings of their own: pass by pass, the states are those of the whole model."""
    cfg = config(kind, num_recursions=3)
    relaxation = RelaxationConfig(lora_rank=2, encoding=True)
    recursion = dataclasses.replace(cfg.model.recursion, share_norms=False, relaxation=relaxation)
    model = dataclasses.replace(cfg.model, recursion=recursion)
    noise = lambda path, leaf: leaf + 0.1 * np.random.default_rng(len(str(path))).normal(size=leaf.shape)  # noqa: E731
    fresh = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    tree = jax.tree.map(jnp.float32, jax.tree.map_with_path(noise, fresh))
    capped = cap_depth(Weights(model, tree), 2)
    tokens_BT, mode = STREAM.tokens[None, :T], "threshold" if kind == "expert" else "topk"

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(model: Any, params: Any) -> Any:
        return forward(model, params, tokens_BT, mode=mode, return_hidden=True, execution="scan").hidden

    whole, short = hidden(model, tree), hidden(capped.config, capped.params)
    assert whole is not None and short is not None and len(short.recursions) == 2
    for wanted, found in zip(whole.recursions[:2], short.recursions, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_token_choice_takes_the_best_depth_that_is_allowed():
    cfg = config("token", num_recursions=3)
    model = weights(cfg, jnp.array([-1.0, 0.0, 1.0]))  # a bias of no effect: this model balances by a loss
    scan = ResolvedPerf(execution="scan")
    kept, depths = _depths(model, scan), _depths(cap_depth(model, 2), scan)
    assert kept.max() == 3
    assert depths.max() == 2 and np.all(depths[kept < 3] == kept[kept < 3])


def test_a_capped_recursive_model_is_the_model_of_fewer_recursions():
    cfg = config("none", sharing="cycle")
    found = sliding_losses(weights(cfg), cfg.perf, {"a": STREAM}, Bytes(), max_depth=1, batch_rows=2)
    plain = dataclasses.replace(cfg.model.recursion, num_recursions=1, base_depth=1)
    once = Weights(dataclasses.replace(cfg.model, recursion=plain), params(cfg))
    other = sliding_losses(once, cfg.perf, {"a": STREAM}, Bytes(), batch_rows=2)
    assert found["max_depth"] == 1 and found["sources"] == other["sources"]
    for cap in (0, 3):
        with pytest.raises(UserError, match=f"max_depth={cap} is outside 1..num_recursions=2"):
            cap_depth(weights(cfg), cap)
    with pytest.raises(UserError, match="sharing='sequence'"):
        cap_depth(Weights(config("none", sharing="sequence").model, {}), 1)

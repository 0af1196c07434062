"""What depth goes with, against literal values; the changes of hidden states; the files of an analysis."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_examples import TEXT, Bytes, T, batch, config, params, weights

from mor_jax.errors import UserError
from mor_jax.evaluate.analysis import ROUTER_METRICS, analyse, router_history
from mor_jax.evaluate.correlates import RoutedText, as_csv, character_kind, correlates, spearman, word_pieces
from mor_jax.evaluate.hidden import hidden_changes
from mor_jax.evaluate.inspect import text_rows
from mor_jax.evaluate.routing import RoutedRow
from mor_jax.model.forward import forward
from mor_jax.model.rows import Rows
from mor_jax.runs.restore import RestoredRun


def _row(text, depths):
    depth_T = np.array(depths)
    selected_RT = np.arange(2)[:, None] < depth_T
    zeros_RT = np.zeros((2, len(depths)), np.float32)
    tokens_T = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return RoutedRow(tokens_T, depth_T, zeros_RT, zeros_RT, selected_RT, selected_RT)


def _text():
    rows = [_row("ab, 7b.", [1, 2, 1, 1, 2, 2, 1]), _row("b", [2])]
    counts = np.zeros(257, np.int64)
    for row in rows:
        counts += np.bincount(row.tokens_T, minlength=257)
    return RoutedText(rows, [np.arange(7.0), np.array([np.nan])], counts, Bytes())


def test_tokens_are_placed_in_their_words():
    assert word_pieces(np.frombuffer(b"ab, 7b.", np.uint8), Bytes().token_bytes).tolist() == [1, 2, 1, 1, 2, 3, 1]
    kinds = [character_kind(piece) for piece in (b"ab", b" a", b" ", b"\n\n", b".", b" 12", b"a1", b"")]
    assert kinds == ["letters", "letters", "blank", "blank", "punctuation", "digits", "mixed", "end of text"]
    assert character_kind("é".encode()) == "letters"


def test_ranks_with_ties():
    assert spearman(np.array([1, 2, 3]), np.array([10, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2])) == pytest.approx(0)
    assert spearman(np.ones(4), np.arange(4)) == 0.0
    # ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4
    assert spearman(np.array([0, 5, 5, 9]), np.array([2, 1, 3, 4])) == pytest.approx(3 / np.sqrt(4.5 * 5))


def test_depth_is_grouped_by_every_property():
    found = {correlate.name: correlate for correlate in correlates(_text())}
    assert list(found) == ["position", "frequency", "next_surprisal", "own_surprisal", "word_piece", "characters"]
    kinds = {group.label: (group.tokens, group.mean_depth) for group in found["characters"].groups}
    assert kinds == {"blank": (1, 1.0), "digits": (1, 2.0), "letters": (4, 1.75), "punctuation": (2, 1.0)}
    pieces = {group.label: (group.tokens, group.mean_depth) for group in found["word_piece"].groups}
    assert pieces == {"piece 1": (5, 1.2), "piece 2": (2, 2.0), "piece 3": (1, 2.0)}
    assert found["characters"].groups[2].shares == [0.0, 0.25, 0.75]
    assert sum(group.tokens for group in found["position"].groups) == 8
    assert sum(group.tokens for group in found["next_surprisal"].groups) == 7  # nothing follows the second row
    assert sum(group.tokens for group in found["own_surprisal"].groups) == 6  # nothing precedes the rows
    frequency = found["frequency"]
    assert frequency.groups[-1].mean_depth == 2.0 and frequency.spearman == pytest.approx(12 / np.sqrt(3 * 5 * 4 * 4))
    table = list(csv.DictReader(as_csv(list(found.values())).splitlines()))
    assert table[0]["property"] == "position" and table[-1]["share_depth_1"] == "1.000000"


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_hidden_changes_are_those_of_the_states(sharing):
    cfg = config("none", sharing=sharing) if sharing == "cycle" else config("expert", sharing=sharing, num_layers=4)
    rows = Rows.of_batch(batch(0))
    mode = "topk" if cfg.model.routing.kind == "none" else "threshold"
    changes = hidden_changes(weights(cfg), cfg.perf, [rows, rows], mode)
    given = {"mode": mode, "positions": rows.positions_BT, "return_hidden": True}
    out = jax.jit(lambda params: forward(cfg.model, params, rows.tokens_BT, **given))(params(cfg))
    assert out.hidden is not None
    before = params(cfg)["embedding"]["embedding"][rows.tokens_BT] if out.hidden.first is None else out.hidden.first
    for r, after in enumerate(out.hidden.recursions):
        selected = np.ones(after.shape[:2], bool) if out.trace is None else np.asarray(out.trace.selected_RBT[r])
        a, b = np.asarray(before)[selected], np.asarray(after)[selected]
        relative = np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)
        cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert changes[r]["tokens"] == 2 * selected.sum()
        np.testing.assert_allclose(changes[r]["relative_change"], relative.mean(), rtol=1e-4)
        np.testing.assert_allclose(changes[r]["cosine"], cosine.mean(), rtol=1e-4)
        before = after


def test_an_analysis_writes_data_and_figures(tmp_path):
    cfg = config()
    run = RestoredRun(cfg, jax.device_put(params(cfg), jax.devices()[0]), jnp.zeros(2), Bytes(), 7)  # type: ignore[arg-type]
    line = dict.fromkeys(ROUTER_METRICS, 0.5) | {"threshold_accuracy_R": [1.0, 0.9]}
    metrics = [{"step": 1, **line}, {"step": 2, "loss": 1.0}, {"step": 3, **line}]
    written = analyse(run, text_rows(Bytes().encode(TEXT), T), metrics, tmp_path / "analysis")
    assert [path.name for path in written] == [
        "analysis.json",
        "depth_by.csv",
        *(f"{name}.{suffix}" for name in ("depth_by", "router", "hidden", "attention") for suffix in ("png", "svg")),
    ]
    assert all(path.stat().st_size > 500 for path in written)
    report = json.loads(written[0].read_text())
    assert report["mode"] == "threshold" and report["run_step"] == 7 and report["over_training"]["step"] == [1, 3]
    assert len(report["hidden_changes"]) == len(report["attention"]) == 2
    assert sum(report["tokens_per_depth"]) == pytest.approx(1)
    counted = sum(group["tokens"] for group in report["depth_by"][0]["groups"])
    assert counted == len(TEXT.encode())
    assert sum(group["tokens"] for group in report["depth_by"][2]["groups"]) == counted - 1  # nothing follows the last
    assert any(entry["text"] == "e" for entry in report["depth_by_token"])
    assert router_history(metrics)["entropy"] == [0.5, 0.5]


def test_a_text_that_predicts_nothing_is_refused():
    with pytest.raises(UserError, match="has 1 tokens, which predict nothing"):
        text_rows([65], T)

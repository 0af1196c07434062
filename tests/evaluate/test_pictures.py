"""The files that a run ends with, written from metrics and a tiny model."""

import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from evaluation_examples import HeldOut, T, batch, config, weights

from mor_jax.errors import UserError
from mor_jax.evaluate import pictures, plots
from mor_jax.evaluate.inspect import text_batches
from mor_jax.evaluate.pictures import run_title, trace_rows, write_run_pictures
from mor_jax.model.rows import Rows

METRICS = [
    {"step": 1, "loss": 5.5, "tokens_per_second": 10.0},
    {"step": 2, "loss": 5.0, "validation_topk_nll": 5.1, "validation_topk_tokens_per_depth": [0.0, 0.5, 0.5]},
    {"step": 4, "loss": 4.5, "validation_threshold_nll": 4.9, "validation_threshold_tokens_per_depth": [0, 0.4, 0.6]},
]


def _write(folder, cfg, metrics=METRICS):
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(lines)
    bias = jnp.zeros(cfg.model.recursion.num_recursions)
    return write_run_pictures(folder, cfg, weights(cfg, bias), HeldOut(batch(0), batch(1, padding=3)))


def _is_picture(path):
    return np.ptp(matplotlib.image.imread(path)[..., :3]) > 0.5


def test_a_routed_model_gets_both_modes(tmp_path):
    written = _write(tmp_path, config())
    assert [path.name for path in written] == ["loss.png", "depth.png", "routing.html"]
    assert _is_picture(tmp_path / "loss.png") and _is_picture(tmp_path / "depth.png")
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    assert page.index("<h2>threshold</h2>") < page.index("<h2>topk</h2>")
    assert page.count('title="token') == 2 * (2 * T + 2 * (T - 2))  # padding is left out


def test_a_long_text_is_cut_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_PAGE_TOKENS", 3 * T)
    _write(tmp_path, config())
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    assert page.count('title="token') == 2 * (2 * T + T - 2) and page.count("the first 3 of 4 rows") == 2


def test_without_a_boundary_the_page_shows_topk_only(tmp_path):
    _write(tmp_path, config(sampling="none"))
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    assert "<h2>topk</h2>" in page and "threshold" not in page and "looks ahead" in page


def test_token_choice_is_called_causal(tmp_path):
    _write(tmp_path, config("token"))
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    assert "token-choice decides every token by itself" in page and "looks ahead" not in page


def test_without_a_router_there_is_only_the_loss(tmp_path):
    assert [path.name for path in _write(tmp_path, config("none"))] == ["loss.png"]
    assert not (tmp_path / "depth.png").exists() and not (tmp_path / "routing.html").exists()


def test_without_metrics_there_is_no_loss_picture(tmp_path):
    assert [path.name for path in _write(tmp_path, config(), metrics=[])] == ["depth.png", "routing.html"]


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_run_pictures(tmp_path / "file" / "run", config("none"), weights(config("none")), HeldOut(batch(0)))


def test_the_rows_drawn_are_those_that_the_model_routed():
    cfg = config()
    (first, second) = trace_rows(weights(cfg, jnp.zeros(2)), cfg.perf, [Rows.of_batch(batch(0))], "topk")
    for row in (first, second):
        assert row.depth_T.min() >= 1 and np.count_nonzero(row.depth_T == 2) == T // 2  # capacities 1 and 1/2
        np.testing.assert_array_equal(row.selected_RT.sum(axis=0), row.depth_T)
    assert first.tokens_T.tolist() == batch(0)["tokens"][0, :-1].tolist()


def test_the_title_names_a_preset_of_another_name(tmp_path):
    assert run_title(tmp_path / "tiny", config()) == "tiny"
    assert run_title(tmp_path / "wide", config()) == "wide (tiny)"


def test_series_keeps_the_last_line_of_a_step():
    steps, values = plots.series([{"step": 3, "a": 1}, {"step": 1, "a": 2}, {"step": 3, "a": 4}, {"step": 5}], "a")
    assert steps.tolist() == [1, 3] and values.tolist() == [2, 4]


def test_series_fills_up_what_a_stage_of_fewer_passes_lacks():
    lines = [{"step": 1, "shares": [0.25, 0.75]}, {"step": 2, "shares": [0.0, 0.5, 0.5]}]
    assert plots.series(lines, "shares")[1].tolist() == [[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]


def test_a_text_is_cut_into_rows_without_padding():
    full, rest = text_batches(range(2 * T + 3), T)
    assert full.tokens_BT.tolist() == [list(range(T)), list(range(T, 2 * T))]
    assert rest.tokens_BT.tolist() == [[2 * T, 2 * T + 1, 2 * T + 2]]
    assert (
        rest.positions_BT is not None and rest.positions_BT.tolist() == [[0, 1, 2]] and np.all(full.segment_ids_BT == 1)
    )
    assert [part.tokens_BT.shape for part in text_batches(range(5), T)] == [(1, 5)]
    assert [part.tokens_BT.shape for part in text_batches(range(T), T)] == [(1, T)]
    with pytest.raises(UserError, match="empty"):
        text_batches([], T)

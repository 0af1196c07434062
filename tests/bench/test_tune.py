"""experiments/serving/tune.py: it tries what was tried, its calls compute what they should, and it needs a GPU."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax import presets
from mor_jax.config import ModelConfig
from mor_jax.infer import product_kernel
from mor_jax.infer.head_kernel import HeadTile
from mor_jax.infer.paged_attention import PagedStore
from mor_jax.infer.product_kernel import Tile
from mor_jax.infer.sampling import sample
from mor_jax.kernels.decode_attention import Reads
from mor_jax.kernels.norm import rms_norm

FOLDER = Path(__file__).parents[2] / "experiments" / "serving"
TINY = ModelConfig(96, 2, 32, 4, 2, 16, 48, 64, dtype="float32")
SLOW = ("qkv", "gate_up", "down")
PROCESSORS = 132
"""Of an H100."""


def _module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs():
    return _module("tune_runs")


@pytest.fixture(scope="module")
def tune(runs):  # which it imports
    return _module("tune")


def _measured(name):
    return json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_tiles_tried_are_those_that_were_measured(tune):
    config = presets.get("vanilla-360m").config.model
    cases = [(rows, case) for rows in (32, 82) for case in tune.products(config)]
    for rows, case in cases:
        before = [row for row in _measured("tiles") if (row["rows"], row["kind"]) == (rows, case.kind)]
        tiles = tune.tiles(case, rows, PROCESSORS)
        assert {Tile(**row["tile"]) for row in before if not row["default"]} <= set(tiles)
        assert set(tiles) <= {Tile(**row["tile"]) for row in before} and len(set(tiles)) == len(tiles)
        assert tiles[0] == product_kernel.tile_for(rows, case.outputs, case.depth, splits=case.splits)


def test_the_fastest_tiles_are_those_that_the_code_chooses(tune):
    config = presets.get("vanilla-360m").config.model
    shapes = {case.kind: (case.outputs, case.depth) for case in tune.products(config)}
    fastest = tune.fastest(_measured("tiles"))
    chosen = {(row["rows"] == 32, *shapes[row["kind"]]): Tile(**row["tile"]) for row in fastest}
    assert chosen == product_kernel._MEASURED


def test_the_sizes_of_the_attention_are_those_that_were_measured(tune):
    rows = [row for row in _measured("attention") if row["version"] == "new"]
    assert [tuple(row["entries_warps_stages"]) for row in rows] == [*tune._READS] * 2
    few, many = tune.fastest(rows)
    chosen = list(dataclasses.astuple(Reads()))
    assert many["rows"] == 82 and many["entries_warps_stages"] == chosen
    (near,) = (row for row in rows if row["rows"] == 32 and row["entries_warps_stages"] == chosen)
    assert near["microseconds"] < 1.03 * few["microseconds"]


@pytest.mark.parametrize("kind", ["output", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_the_products_timed_are_those_of_a_layer(runs, kind):
    (case,) = (case for case in runs.products(TINY) if case.kind == kind)
    run = runs.ProductRun(case, 5, 2, "float32", interpret=True)
    tile = Tile(rows=16, outputs=16, depth=16, parts=2 if case.splits else 1)
    for out_BN, weight in zip(run(tile), run.weights, strict=True):
        x_BK = run.x_BK if case.splits else rms_norm(run.x_BK[:, None], run.scale_K, runs.EPSILON)[:, 0]
        want = jnp.einsum("BK,...NK->...BN", x_BK, weight)
        if kind == "gate_up":
            want = jax.nn.silu(want[0]) * want[1]
        np.testing.assert_allclose(out_BN, want + run.residual_BN if case.splits else want, atol=1e-4)
    assert not np.any(run._tickets_X)


@pytest.mark.slow
def test_the_attention_timed_is_that_of_a_decoded_token(runs):
    run = runs.AttentionRun(TINY, 3, 20, 4, 2, interpret=True)
    assert run.visible_B.tolist() == [1, 20, 39]
    pools = [(jnp.array(keys), jnp.array(values)) for keys, values in run.pools]  # the others are taken over
    table_BM, visible_B = jnp.asarray(run.table_BM), jnp.asarray(run.visible_B)
    store = PagedStore(table_BM, visible_B - 1, jnp.ones(3, jnp.int32), visible_B[:, None], run.page_size)
    rotary = (run.angles[0][:, None, None], run.angles[1][:, None, None])
    for _ in range(2):  # again in the same places
        for out_BNH, pool in zip(run(Reads(entries=16)), pools, strict=True):
            want, _ = store.attend(run.projected_BMH[:, None], pool, rotary)
            np.testing.assert_allclose(out_BNH, want[:, 0], atol=1e-5)


@pytest.mark.slow
def test_the_head_timed_is_that_of_a_decoded_token(runs):
    run = runs.HeadRun(TINY, 5, 2, interpret=True)
    hidden_ED = rms_norm(run.x_ED[:, None], run.scale_D, runs.EPSILON)[:, 0]
    for (token_E, log_probability_E), head_VD in zip(run(HeadTile(16, 16)), run.heads, strict=True):
        want = sample(hidden_ED @ head_VD.T, run.rows, run.position_E)
        np.testing.assert_array_equal(token_E, want[0])
        np.testing.assert_allclose(log_probability_E, want[1], atol=1e-4)


def test_files_have_the_form_of_those_that_were_measured(tune, tmp_path, monkeypatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="none", core_count=PROCESSORS)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    times = itertools.cycle([[3.0, 5.0, 4.0], [2.0, 2.0]])

    def kernels(run, name, repeats):
        found = next(times)
        if name == "product_gated" and len(found) == 2:
            raise jax.errors.JaxRuntimeError("shared memory\nand more")
        return found

    monkeypatch.setattr(tune, "kernel_microseconds", kernels)
    monkeypatch.setattr(tune, "copies_for", lambda size, settings: 2)
    monkeypatch.setattr(tune.presets, "get", lambda name: SimpleNamespace(config=SimpleNamespace(model=TINY)))
    tune.tune(tune.Settings(tmp_path, rows=(8, 40), held=20))
    written = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tiles", "attention", "tuning")}
    failed = [row for row in written["tiles"] if "error" in row]
    assert all(row["kind"] == "gate_up" and row["error"] == "shared memory" for row in failed)
    for row in written["tiles"]:
        assert row.keys() - {"error"} == _measured("tiles")[0].keys() and row["tile"].keys() == Tile().__dict__.keys()
    assert {row["microseconds"] for row in written["tiles"]} <= {4.0, 2.0, None}
    assert [row["rows"] for row in written["attention"]] == [8] * 8 + [40] * 8
    assert _measured("attention")[1].keys() <= written["attention"][0].keys()
    record = written["tuning"]
    assert record["device"] == "none" and record["processors"] == PROCESSORS and "command" in record
    assert {(row["rows"], row["kind"]) for row in record["fastest_head"]} == {(8, "head"), (40, "head")}
    assert all(row["microseconds"] == 2.0 for row in record["fastest_attention"])


def test_without_a_gpu_it_says_so(tune, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(tmp_path / "found")])
    assert tune.main() == 2
    assert capsys.readouterr().err == "tune: kernels can be measured on a GPU alone, not on device='cpu'\n"
    assert not (tmp_path / "found").exists()

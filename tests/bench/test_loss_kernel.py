"""experiments/throughput/loss_kernel.py: its programs compute the same loss, and it needs a GPU."""

import sys

import pytest

from experiment_script import load_script
from mor_jax.config import ModelConfig
from mor_jax.kernels import cross_entropy
from mor_jax.kernels.cross_entropy import RowTile

TINY = ModelConfig(96, 2, 32, 4, 2, 16, 48, 64, dtype="float32")


@pytest.fixture(scope="module")
def script():
    return load_script("throughput/loss_kernel")


def test_head_and_loss_agree_in_every_program(script, tmp_path, monkeypatch):
    seen, usual = [], cross_entropy.TILE
    kernel = cross_entropy.softmax_cross_entropy
    monkeypatch.setattr(
        cross_entropy,
        "softmax_cross_entropy",
        lambda *x, **y: (seen.append(cross_entropy.TILE.columns), kernel(*x, **y))[1],
    )
    settings = script.Settings(tmp_path / "x.json", rows=2, length=9, chunks=(4, 8), repeats=1)
    rows = script.measure_loss(TINY, settings, (RowTile(32), RowTile(64)))
    assert [(row["chunk_tokens"], row["fusion"]) for row in rows] == [
        (chunk, fusion) for chunk in (4, 8) for fusion in ("xla", "triton", "triton")
    ]
    assert seen == [32, 64] * 2 and cross_entropy.TILE is usual
    assert all(0 < row["fastest"] <= row["milliseconds"] for row in rows)
    differences = [value for row in rows for value in row["difference"].values()]
    assert max(differences) < 1e-5 and any(differences)


def test_the_kernel_alone_is_timed_beside_xla(script, tmp_path, monkeypatch):
    """Where no trace shows kernels' names; a size that a card refuses is a row without a time."""

    def timed(run, name, repeats):
        run()
        if timed_rows:
            raise script.jax.errors.JaxRuntimeError("too much\nof it")
        timed_rows.append(name)
        return 2.0

    timed_rows: list[str] = []
    monkeypatch.setattr(script, "kernel_microseconds", timed)
    monkeypatch.setattr(script, "TILES", (RowTile(32),))
    xla, kernel = script.measure_tiles(TINY, script.Settings(tmp_path / "x.json", rows=2, chunks=(4,)))
    assert (xla["tile"], xla["microseconds"]) == (None, 2.0)
    assert xla["gigabytes_per_second_of_one_read_one_write"] == pytest.approx(2 * 4 * 96 * 4 / 2e-6 / 1e9)
    assert (kernel["tile"]["columns"], kernel["microseconds"], kernel["error"]) == (32, None, "too much")


def test_without_a_gpu_it_says_so(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss_kernel.py", "--out", str(tmp_path / "x.json")])
    assert script.main() == 2
    assert capsys.readouterr().err == "loss_kernel: the kernel can be timed on a GPU alone, not on device='cpu'\n"
    assert not (tmp_path / "x.json").exists()


def test_chunks_are_of_whole_rows(script, tmp_path):
    with pytest.raises(script.UserError, match="chunks="):
        script.Settings(tmp_path, rows=16, chunks=(24,))

"""experiments/throughput/triton_ablation.py: leaving a kernel out takes effect, and changes rounding only."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment_script import load_script
from mor_jax.config import Config, ModelConfig, PerfConfig, TrainConfig
from mor_jax.kernels.attention.backend import attend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.attention.reference import plain_attention
from mor_jax.mesh.mesh import make_mesh
from mor_jax.perf import resolve_perf

MODEL = ModelConfig(48, 2, 16, 2, 1, 16, 32, 16, dtype="float32")
KERNELS = {
    "norm": {"mor_add_norm", "mor_skip_norm", "mor_norm_gradient"},
    "split and rotation": {"mor_split_rotate", "mor_split_rotate_gradient"},
    "gradient of SwiGLU": {"mor_swiglu_gradient"},
    "softmax of the loss": {"mor_cross_entropy"},
}


@pytest.fixture(scope="module")
def script():
    return load_script("throughput/triton_ablation")


@pytest.fixture
def config():
    config = Config(model=MODEL, train=TrainConfig(batch_size=2, steps=100), perf=PerfConfig(fusion="triton"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return dataclasses.replace(config, perf=resolve_perf(config, mesh).asked), mesh


def test_each_variant_lacks_its_kernels_alone(script, config):
    found = {}
    for name in (None, *KERNELS):
        with script.without(name):
            found[name] = set(script.triton_kernels(*config))
    everything = set.union(*KERNELS.values())
    assert found == {None: everything} | {name: everything - kernels for name, kernels in KERNELS.items()}
    with script.without(None):  # and they come back
        assert set(script.triton_kernels(*config)) == everything


def test_attention_without_its_kernel_is_dense(script, monkeypatch):
    """No CPU runs the kernel of attention, so here it is asked for by hand."""
    calls = []
    monkeypatch.setattr(script.backend.triton, "flash_attention", lambda *x: calls.append(1) or x[0])
    x_BTNH, rows_BT = jax.random.normal(jax.random.key(0), (1, 8, 2, 16)), jnp.arange(8)[None]
    mask = Mask(TokenView(rows_BT, rows_BT, segments_BC=rows_BT // 4))
    attend(x_BTNH, x_BTNH, x_BTNH, mask, "triton")
    assert calls == [1]
    with script.without("attention"):
        out_BTNH = attend(x_BTNH, x_BTNH, x_BTNH, mask, "triton")
    assert calls == [1]
    np.testing.assert_array_equal(out_BTNH, plain_attention(x_BTNH, x_BTNH, x_BTNH, mask.dense()))


def test_the_programs_are_timed_in_turn(script, config, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "parse_case", lambda text: SimpleNamespace(config=config[0]))
    left_out = ("norm", "softmax of the loss", "attention")  # of the last a CPU has no kernel
    monkeypatch.setattr(script, "ABLATIONS", {name: script.ABLATIONS[name] for name in left_out})
    settings = script.Settings(tmp_path / "x.json", case="tiny", rows=2, steps=1, warmup=0, rounds=2)
    record = script.measure(settings)
    assert json.loads(settings.out.read_text())["variants"] == record["variants"]
    assert [variant["without"] for variant in record["variants"]] == [None, "norm", "softmax of the loss"]
    first, *others = record["variants"]
    for variant in others:
        assert variant["first_loss"] == pytest.approx(first["first_loss"], rel=1e-5)
        assert variant["kernel_saves_milliseconds"] == pytest.approx(variant["milliseconds"] - first["milliseconds"])
    assert all(len(variant["milliseconds_by_round"]) == 2 for variant in record["variants"])


def test_a_step_without_such_kernels_is_refused(script, tmp_path, monkeypatch, capsys):
    plain = ["triton_ablation.py", "--case", "debug", "--rows", "2", "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", plain)
    assert script.main() == 2
    assert capsys.readouterr().err == "triton_ablation: this step has no kernel in Triton\n"
    assert not (tmp_path / "x.json").exists()

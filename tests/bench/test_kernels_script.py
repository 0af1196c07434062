"""experiments/throughput/kernels.py at a tiny size in the interpreter; it refuses to time anything but a GPU."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mor_jax.kernels import rotary as rotary_gpu

FILE = Path(__file__).parents[2] / "experiments" / "throughput" / "kernels.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("kernels", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)  # as Python does for a script
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(script) -> Any:
    return script.Shape(rows=2, tokens=12, selected=9, width=16, heads=2, kv_heads=1, head_dim=4, dtype="float32")


def test_a_device_that_is_no_gpu_is_refused(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "kernels.py: device='cpu' is no GPU\n"


def test_unknown_cases_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", "x.json", "--cases", "norm"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "'norm' is none of skip_norm" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["skip_norm", "split_rotate_gradient", "projection"])
def test_the_variants_of_a_case_compute_the_same(name, script, tiny):
    case = script.CASES[name](tiny)
    want, got = (jax.tree.leaves(jax.jit(function)(*case.arguments)) for function in case.variants.values())
    for before, after in zip(want, got, strict=True):
        np.testing.assert_allclose(after, before, atol=2e-5, rtol=2e-5)


def test_the_record_and_the_tuning(script, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(script.TUNABLE, "split_rotate", (rotary_gpu, {"ROWS": (4, 8), "HEADS": (1,)}))
    before = rotary_gpu.ROWS, rotary_gpu.HEADS
    settings = script.Settings(tmp_path / "x.json", cases=("split_rotate",), repeats=2, calls=1, tune=True)
    script.run(settings, tiny)
    record = json.loads(settings.out.read_text())
    (result,) = record["results"]
    assert result["variants"]["xla"]["times_faster"] == 1 and result["variants"]["kernel"]["gb_per_second"] > 0
    assert sorted(found["constants"]["ROWS"] for found in result["tuned"]) == [4, 8]
    assert before == (rotary_gpu.ROWS, rotary_gpu.HEADS) and "jax" in record["versions"]

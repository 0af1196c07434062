"""experiments/serving/host_work.py: the stand-in for the device gives the engine what its programs would."""

import jax
import pytest

from experiment_script import load_script
from mor_jax.infer import engine as engine_module


def test_the_stand_in_keeps_slots_full_and_takes_half_of_the_tokens_further(monkeypatch):
    for module, name in ((engine_module, "prefill"), (engine_module, "exchange"), (jax, "device_get")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they come back
    load_script("serving/cells_worker")
    found = load_script("serving/host_work").measure(recursions=3, sequences=8, dispatches=40, freeze=False)
    assert found["block_use"] > 0.95 and found["prompts_per_chunk"] >= 1
    assert found["tokens_per_dispatch"] * 1.75 == pytest.approx(16 * 8, rel=0.05)  # 1, 2 or 3 passes: 1/2, 1/4, 1/4
    assert 0 < found["host_ms_per_dispatch"]["p50"] <= found["host_ms_per_dispatch"]["most"]

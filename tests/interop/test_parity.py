"""The model against what the official release computed: logits, losses, gradients, hidden states and routing."""

import dataclasses
from typing import Any, get_args

import golden_files
import jax
import numpy as np
import pytest

from mor_jax.config import RotaryPositions
from mor_jax.interop import official
from mor_jax.interop.parity import TOLERANCES, compare, packed
from mor_jax.model.forward import forward

QUICK = {
    "vanilla_L2_padded",
    "rec_middle_cycle_nr3_L9",
    "kv_rec_sequence_nr3_L6",
    "rec_middle_cycle_nr3_L8_noln",
    "kv_mor_expert_mc3_update",
    "mor_expert_c3_default",
    "mor_expert_mc3_auxrouter",
    "mor_expert_mc3_padded",
    "mor_expert_mc3_warmup4of10",
    "kv_mor_token_mc3",
    "mor_token_mc3_lossfree",
    "mor_token_mc3_warmup",
}
QUICK_SCAN = {"kv_mor_expert_mc3_update", "mor_expert_mc3_warmup4of10", "kv_mor_token_mc3"}
QUICK_PACKED = {"vanilla_L2_padded", "mor_expert_mc3_padded"}
DOCUMENTS = (7, 11, 6)
FULL = golden_files.full_folder()


def _cases(quick: set[str]) -> list:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in golden_files.names()]


def test_the_quick_cases_exist():
    assert set(golden_files.names()) >= QUICK | QUICK_SCAN
    assert len(golden_files.names()) == 40


@pytest.mark.parametrize("name", _cases(QUICK))
def test_gather_equals_the_release(name):
    assert compare(golden_files.read(name)).failures == []


@pytest.mark.parametrize("name", _cases(QUICK_SCAN))
def test_scan_equals_the_release(name):
    assert compare(golden_files.read(name), "scan").failures == []


@pytest.mark.parametrize("name", _cases(QUICK_PACKED))
def test_packed_documents_are_one_text_as_in_the_release(name):
    assert compare(golden_files.read(name), documents=DOCUMENTS).failures == []


@pytest.mark.parametrize(
    "name", ["vanilla_L2", "mor_expert_mc3_default", pytest.param("mor_token_mc3_default", marks=pytest.mark.slow)]
)
def test_a_masked_document_is_the_document_alone(name):
    """Causal selection; top-k compares the tokens of a row, whatever document they are of."""
    tokens_BT = golden_files.read(name)["input_ids"]
    config, params = official.load(*golden_files.model(name))
    mode = "threshold" if config.routing.kind == "expert" else "topk"
    halves = tokens_BT.reshape(-1, 12)
    alone = jax.jit(lambda params: forward(config, params, halves, mode=mode).logits)(params)
    given: Any = packed(tokens_BT, (12, 12))
    for positions in get_args(RotaryPositions):
        masked = dataclasses.replace(config, attend_across_documents=False, rotary_positions=positions)
        logits = jax.jit(lambda params, model=masked: forward(model, params, tokens_BT, mode=mode, **given).logits)
        found = logits(params).reshape(alone.shape)
        np.testing.assert_allclose(found, alone, atol=TOLERANCES["logits"])


@pytest.mark.slow
@pytest.mark.skipif(FULL is None, reason="MOR_GOLDENS names no folder of full golden files")
@pytest.mark.parametrize("name", golden_files.names(FULL) if FULL else [])
def test_full_files_with_hidden_states_and_whole_gradients(name):
    assert FULL is not None
    report = compare(golden_files.read(name, FULL))
    assert report.failures == []
    assert {"logits", "hidden", "lm", "total", "gradients"} <= report.errors.keys()


@pytest.mark.parametrize(
    ("name", "tensor", "change", "seen"),
    [
        ("mor_expert_c3_default", "param/model.norm.weight", 1e-4, "logits"),
        ("kv_rec_sequence_nr3_L6", "grad/lm_head.weight", 1e-4, "gradients"),
        ("kv_mor_token_mc3", "f64/grad_proj", 1.0, "gradients"),
        ("mor_token_mc3_warmup", "train/depth", 1, "routing"),
    ],
)
def test_a_difference_is_seen(name, tensor, change, seen):
    case = golden_files.read(name)
    case[tensor] = (case[tensor] + change).astype(case[tensor].dtype)
    assert any(failure.startswith(seen) for failure in compare(case).failures)


def test_loss_free_loads_move_the_bias_as_released():
    name = "mor_token_mc3_lossfree"
    case = golden_files.read(name)
    meta, state = golden_files.model(name)
    config, params = official.load(meta, state)
    trace = jax.jit(lambda params: forward(config, params, case["input_ids"], train=True, step=1).trace)(params)
    assert trace is not None
    load_R = np.asarray(trace.statistics.load_R)
    moved_R = params["router_state"]["bias"] + config.routing.bias_update_rate * np.sign(load_R.mean() - load_R)
    np.testing.assert_allclose(moved_R, case["train/router_bias_after_update"], rtol=1e-6)

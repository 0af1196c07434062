"""Benchmark cases, their comparison, and the attribution of kernels to kinds of work."""

import dataclasses

import jax
import numpy as np
import pytest

from mor_jax import presets
from mor_jax.bench.cases import parse_case
from mor_jax.bench.measure import Request, measure, random_batch, tokens_per_recursion
from mor_jax.bench.profile import KINDS, kind_of, read_instructions
from mor_jax.bench.run import Settings, measured_config, profile_table, ratios, table
from mor_jax.config import Config, ModelConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.errors import UserError

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=4,
    d_model=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    d_ff=64,
    context_length=32,
    dtype="float32",
    recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle"),
    routing=RoutingConfig(kind="expert"),
)

HLO = """HloModule jit_step
%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %dot.9 = f32[8]{0} dot(%p, %p), metadata={op_name="jit(f)/block/ffn/dot_general"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %custom-call.1 = (f32[8]{0}, s8[4]{0}) custom-call(), custom_call_target="__cublas$gemm", metadata={op_name="dot"}
  %fusion.2 = f32[8]{0} fusion(%a), kind=kCustom, calls=%fused.1, metadata={op_name="jvp(T)/first/ffn/dot_general"}
  %fusion.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%other, metadata={op_name="jvp(T)/block/ffn_norm/mul"}
  %custom-call.4 = f32[8]{0} custom-call(%a), custom_call_target="fmha", metadata={op_name="j/block/attend/fmha"}
  %custom-call.10 = f32[8]{0} custom-call(%a), metadata={op_name="j/block/ffn/f/mor_hopper_gate_up_swiglu/mpmd_map"}
  %gather.5 = f32[8]{0} gather(%a, %a), metadata={op_name="jvp(T)/T._recursions/routing/gather"}
  %dot.6 = f32[8]{0} dot(%a, %a), metadata={op_name="jit(f)/jvp(head_loss)/while/body/dot_general"}
  %add.7 = f32[8]{0} add(%a, %a), metadata={op_name="jit(f)/optimiser/add"}
  %while.8 = f32[8]{0} while(%a), condition=%c, body=%b
  %while.11 = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.1), condition=%c, body=%b
  %convolution.12 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} convolution(%p, %p), metadata={op_name="jit(f)/block/ffn/dot"}
  ROOT %copy.9 = f32[8]{0} copy(%a)
}
"""


def test_a_case_is_a_preset_with_overrides():
    case = parse_case('debug:remat=full,train.seed=3,compiler_options=["a=1","b=2"]', ("loss_chunk=32",))
    perf = case.config.perf
    assert (perf.remat, perf.loss_chunk, perf.compiler_options) == ("full", 32, ("a=1", "b=2"))
    assert case.config.train.seed == 3
    assert parse_case("debug:scan_unroll=None").config.perf.scan_unroll is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("debgu", "unknown preset 'debgu'; did you mean 'debug'"),
        ("debug:remt=full", "unknown field 'perf.remt'; did you mean 'remat'"),
        ("debug:remat", "not of the form field=value"),
        ("debug:remat=half", "remat='half' is not one of"),
        ("debug:routing.kind=none", "unknown field 'routing'"),
    ],
)
def test_a_mistaken_case_is_named(text: str, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_case(text)


def test_packed_rows_restart_positions_where_the_document_changes():
    batch = random_batch(MODEL, 3, packed=True, seed=0)
    segments, positions = batch["segment_ids"], batch["positions"]
    assert segments.shape == (3, MODEL.context_length + 1) and segments.min() == 1
    starts = np.diff(segments, axis=1, prepend=0) > 0
    np.testing.assert_array_equal(positions == 0, starts)
    assert np.all(np.diff(positions, axis=1)[~starts[:, 1:]] == 1)
    assert np.all(random_batch(MODEL, 3, packed=False, seed=0)["segment_ids"] == 1)


def test_packed_documents_attend_to_themselves_alone():
    config = presets.get("vanilla-135m").config
    assert config.model.attend_across_documents
    assert measured_config(config, Settings()).model == config.model
    assert not measured_config(config, Settings(packed=True)).model.attend_across_documents


def test_kernels_are_attributed_by_scope_and_opcode():
    instructions = read_instructions(HLO)
    kinds = {name: kind_of(instruction) for name, instruction in instructions.items()}
    assert kinds == {
        "dot.9": "block matmuls",
        "custom-call.1": "block matmuls",
        "fusion.2": "block matmuls",  # its computation holds a dot
        "fusion.3": "block other",
        "custom-call.4": "attention",
        "custom-call.10": "block matmuls",  # this project's
        "gather.5": "routing",
        "dot.6": "head + loss",
        "add.7": "optimiser",
        "while.8": "other",
        "while.11": "other",  # as a TPU's text has it, with layouts and memory spaces
        "convolution.12": "block matmuls",
        "copy.9": "other",
    }
    assert [name for name, i in instructions.items() if i.is_control] == ["while.8", "while.11"]
    assert kind_of(None) == "other"


def _result(name: str, seconds: float, flops: float, size: int) -> dict:
    return {
        "name": name,
        "tokens_per_recursion": [8],
        "step_seconds": seconds,
        "step_seconds_spread": 0.01,
        "tokens_per_second": 100 / seconds,
        "train_flops": flops,
        "mfu": None,
        "peak_bytes": size,
        "program_bytes": {"total": size},
        "compile_seconds": 1.0,
    }


def test_ratios_are_to_the_first_case_that_finished():
    cases = [{"name": "broken", "error": "out of memory"}, _result("a", 2.0, 10.0, 4), _result("b", 1.0, 8.0, 3)]
    (ratio,) = ratios(cases)
    assert (ratio["name"], ratio["over"], ratio["tokens_per_second"]) == ("b", "a", 2.0)
    assert (ratio["step_seconds"], ratio["train_flops"], ratio["peak_bytes"]) == (0.5, 0.8, 0.75)
    assert ratio["step_seconds_over_train_flops"] == pytest.approx(0.625)
    text = table({"cases": cases, "ratios": [ratio]})
    assert "failed: out of memory" in text and "0.625" in text


def test_rows_are_those_of_each_device(monkeypatch):
    devices, two = 2, jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    config = Config(model=MODEL, train=TrainConfig(batch_size=2, steps=100))
    config = measured_config(config, Settings(rows=3))
    result = measure(Request("tiny", config, steps=1, warmup=0, packed=False, devices=0, profile=""))
    assert result["devices"] == devices and result["config"]["train"]["batch_size"] == 3 * devices
    assert result["tokens_per_second"] == pytest.approx(3 * devices * 32 / result["step_seconds"])


def test_a_case_beside_itself_is_related_to_the_first_alone():
    cases = [_result("a", 2.0, 10.0, 4), _result("a", 2.5, 10.0, 4)]
    first, second = table({"cases": cases, "ratios": ratios(cases)}).splitlines()[1:]
    assert "1.250" in second and "1.250" not in first


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="steps=0 must be positive"):
        Settings(steps=0)
    request = Request("tiny", Config(model=MODEL), steps=1, warmup=0, packed=False, devices=9, profile="")
    with pytest.raises(UserError, match="devices=9, but there are 8"):
        measure(request)


def test_measuring_runs_the_train_step_and_accounts_for_its_time(tmp_path):
    config = Config(model=MODEL, train=TrainConfig(batch_size=2, steps=100))
    config = dataclasses.replace(config, perf=dataclasses.replace(config.perf, loss_chunk=16))
    request = Request("tiny", config, steps=3, warmup=1, packed=False, devices=1, profile=str(tmp_path))
    result = measure(request)
    assert result["tokens_per_recursion"] == tokens_per_recursion(MODEL) == [32, 16]
    assert result["steps_timed"] == 3
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert result["config"]["perf"]["remat"] == "none" and result["program_bytes"]["total"] > 0
    assert 3 < result["metrics"]["loss"] < 5  # near log(64)
    kinds = result["profile"]["seconds_by_kind"]
    assert list(kinds) == list(KINDS)
    assert kinds["attention"] > 0 and kinds["head + loss"] > 0 and kinds["optimiser"] > 0 and kinds["routing"] > 0
    assert "attention" in profile_table({"cases": [result]})
    assert "beside_clock" not in result["profile"]  # a TPU's alone

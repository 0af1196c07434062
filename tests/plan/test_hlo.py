"""Compiled HLO text: loops multiplied out, and matrix products counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mor_jax.plan.hlo import ArrayShape, parse
from mor_jax.plan.hlo_flops import matrix_flops

PROGRAM = """\
HloModule step, is_scheduled=true, entry_computation_layout={(f32[2,3]{1,0})->f32[2,3]{1,0}}

%condition (state.1: (s32[], bf16[8,4])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %goes_on = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%fused (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  ROOT %product = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(step)/body/dot"}
}

%body (state.2: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state.2 = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%state.2), index=1
  %w = bf16[4,4]{1,0} constant({...})
  %fusion.1 = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, backend_config={"window":[]}
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%x, %fusion.1)
}

%yes (p: f32[2,3]) -> f32[2,2] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %square = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%no (q: f32[2,3]) -> f32[2,2] {
  %q = f32[2,3]{1,0} parameter(0)
  ROOT %zeros = f32[2,2]{1,0} constant({ { 0, 0 }, { 0, 0 } })
}

ENTRY %main (x.1: f32[2,3]) -> f32[2,2] {
  %x.1 = f32[2,3]{1,0} parameter(0)
  %start = (s32[], bf16[8,4]{1,0}) custom-call(), custom_call_target="tpu_custom_call"
  %while.1 = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %gemm = (f32[2,2]{1,0}, s8[64]{0}) custom-call(%x.1, %x.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %go = pred[] constant(true)
  ROOT %if = f32[2,2]{1,0} conditional(%go, %x.1, %x.1), true_computation=%yes, false_computation=%no
}
"""


def test_a_program_is_parsed_and_its_loops_multiplied_out():
    module = parse(PROGRAM)
    assert module.entry == "main" and module.unknown_loops == ()
    assert module.executions == {"main": 1, "body": 5, "condition": 6, "fused": 5, "yes": 1, "no": 1}
    start = module.computations["main"].instructions["while.1"]
    assert start.opcode == "while" and start.operands == ("start",)
    assert start.shapes == (ArrayShape("s32", ()), ArrayShape("bf16", (8, 4)))
    assert [shape.bytes for shape in start.shapes] == [4, 64]
    assert module.computations["no"].instructions["zeros"].is_root


def test_products_are_counted_by_origin_and_opaque_calls_are_named():
    flops = matrix_flops(parse(PROGRAM))
    body, square, gemm = 5 * 2 * 8 * 4 * 4, 2 * 2 * 2 * 3, 2 * 2 * 2 * 3
    assert flops.by_op_name == {"jit(step)/body/dot": body, "": square + gemm}
    assert flops.total == body + square + gemm
    assert flops.opaque_calls == {"tpu_custom_call": 1}


def test_a_loop_without_a_constant_limit_is_named():
    for limit in ("parameter(1)", "constant(-2147483648)"):
        module = parse(PROGRAM.replace("s32[]{:T(128)} constant(5)", f"s32[]{{:T(128)}} {limit}"))
        assert module.unknown_loops == ("while.1",) and module.executions["body"] == 1


def test_a_condition_that_calculates_does_not_tell_the_trips():
    """A loop over blocks of 512 entries, up to what is held: `counter * 512 < held`."""
    compared = "%counter, %limit), direction=LT"
    text = PROGRAM.replace(f"compare({compared}", "compare(%read, %limit), direction=LT").replace(
        "constant(5)", "constant(512)\n  %read = s32[] multiply(%counter, %limit)"
    )
    module = parse(text)
    assert compared in PROGRAM and module.unknown_loops == ("while.1",) and module.executions["body"] == 1
    twice = dataclasses.replace(module, unknown_trips=2).executions
    assert (twice["body"], twice["condition"], twice["fused"]) == (2, 3, 2)


def test_a_switch_takes_the_branch_that_it_is_told():
    branches = "branch_computations={%no, %yes, %yes}"
    module = parse(PROGRAM.replace("true_computation=%yes, false_computation=%no", branches))
    assert module.executions["yes"] == 2 and module.executions["no"] == 1
    first = dataclasses.replace(module, switch=0).executions
    assert (first["yes"], first["no"]) == (0, 1)


@pytest.mark.parametrize(
    ("convolution", "products"),
    [
        # two image rows of 5 pixels, 3 channels to 4, a window of 3 with a border of 1: 13 of 15 places hold a pixel
        (
            "f32[2,5,4]{2,1,0} convolution(f32[2,5,3], f32[3,3,4]), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            312,
        ),
        # a batch of 6 products [2, 3] x [3, 4], the way TPU compilers write it: the batch as a dilated window
        (
            "f32[6,2,4]{2,1,0} convolution(f32[6,2,3], f32[6,3,4]), window={size=6 stride=5 pad=0_5 lhs_dilate=6}, "
            "dim_labels=0bf_0io->0bf",
            6 * 2 * 3 * 4,
        ),
        # depth-wise: every channel has its own window
        (
            "f32[2,5,4]{2,1,0} convolution(f32[2,5,4], f32[1,1,4]), window={size=1}, dim_labels=b0f_0io->b0f, "
            "feature_group_count=4",
            2 * 5 * 4,
        ),
    ],
)
def test_convolutions_count_only_places_that_hold_an_element(convolution, products):
    operands = convolution[convolution.index("(") + 1 : convolution.index(")")]
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands.split(", "))]
    text = "ENTRY %main () -> f32[] {\n" + "\n".join(lines)
    text += f"\n  ROOT %c = {convolution.replace(operands, '%p0, %p1')}\n}}\n"
    assert matrix_flops(parse(text)).total == 2 * products


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule empty\n")


def test_a_compiled_scan_over_recursions_and_layers_counts_every_layer():
    """The gradient of three passes over five layers: one product forward and two backward for each."""
    size, layers, recursions = 32, 5, 3

    def loss(weights_LDD, x_BD):
        def layer(x_BD, weight_DD):
            return jnp.tanh(x_BD @ weight_DD), None

        def recursion(x_BD, _):
            return jax.lax.scan(layer, x_BD, weights_LDD)[0], None

        return jnp.sum(jax.lax.scan(recursion, x_BD, None, length=recursions)[0])

    shapes = (jax.ShapeDtypeStruct((layers, size, size), "float32"), jax.ShapeDtypeStruct((8, size), "float32"))
    module = parse(jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text() or "")
    assert module.unknown_loops == ()
    product = 2 * 8 * size * size
    assert matrix_flops(module).total == 3 * product * layers * recursions

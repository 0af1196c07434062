"""The compiler's clock: a kernel's program counted by hand, loops and kinds of a small program, what is attainable."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mor_jax import presets
from mor_jax.errors import UserError
from mor_jax.plan import bundle_machine, bundles, hlo
from mor_jax.plan.attainable import attainable_seconds
from mor_jax.plan.clock import read_clock
from mor_jax.plan.clock_kernels import kernel_costs, run_time_tables
from mor_jax.plan.clock_report import clock_report
from mor_jax.plan.topology import GENERATIONS

FOLDER = Path(__file__).parents[1] / "fixtures" / "tpu_clock"
"""A grid of 8 over float32 [512, 128]; step i runs an inner loop from n[2 i] to n[2 i + 1] (v5e, libtpu 0.0.50.1)."""
ESTIMATE = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
PROGRAM = f"""HloModule jit_step

%fused (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8] parameter(0)
  ROOT %dot.1 = bf16[8,8] convolution(%p, %p), dim_labels=bf_io->bf, metadata={{op_name="_routed_recursions/ffn/dot"}}
}}

%body (s: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %s = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,8] get-tuple-element(%s), index=1
  %fusion.1 = bf16[8,8] fusion(%x), kind=kOutput, calls=%fused, metadata={{op_name="jit/norm/mul"}}, {ESTIMATE % 100}
  %copy.1 = bf16[8,8] copy(%fusion.1), metadata={{op_name="jit/block/attention/transpose"}}, {ESTIMATE % 7}
  ROOT %out = (s32[], bf16[8,8]) tuple(%i, %copy.1)
}}

%condition (s: (s32[], bf16[8,8])) -> pred[] {{
  %s = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main (n: s32[16], x: f32[512,128], s: (s32[], bf16[8,8])) -> f32[512,128] {{
  %n = s32[16] parameter(0)
  %x = f32[512,128] parameter(1)
  %s = (s32[], bf16[8,8]) parameter(2)
  %while.1 = (s32[], bf16[8,8]) while(%s), condition=%condition, body=%body
  %all-reduce.1 = f32[512,128] all-reduce(%x), to_apply=%add
  ROOT %dyn_kernel.2 = f32[512,128] custom-call(%n, %x), custom_call_target="tpu_custom_call", attributes={{{{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="jit/block/attention/attend/pallas_call"}}, backend_config={{}}
}}
"""


@pytest.fixture(scope="module")
def program():
    return bundles.parse(next(FOLDER.iterdir()).read_text())


@pytest.mark.parametrize("rounds", [(1, 2, 3, 4, 5, 6, 7, 8), (1, 0, 3, 0, 0, 0, 0, 8)])
def test_a_kernel_counted_by_hand(program, rounds):
    """Bundles by address: 0x0-0xa once; ten rounds of the grid's pipeline; 0x6a-0x6d once; four behind every branch."""
    head, tail, drain = 0x29 - 0xB, 0x66 - 0x5E + 4, 4
    step = (0x33 - 0x29) + (0x5E - 0x51)
    inner = [0 if n == 0 else (0x39 - 0x33) + n * (0x4D - 0x39 + 4) for n in rounds]
    empty = 4 * sum(n == 0 for n in rounds)
    by_hand = 0xB + 10 * (head + tail) + 2 * drain + 8 * step + sum(inner) + empty + 4
    table = np.array([(5, 5 + n) for n in rounds]).reshape(-1)
    counted = bundle_machine.count(program, {0: table})
    assert counted.bundles == by_hand
    assert counted.transferred == 512 + 2 * 512 * 128 * 4  # the table, filled up; x read and written once
    assert counted.guesses == 0


def test_without_its_table_a_kernel_says_what_it_guessed(program):
    counted = bundle_machine.count(program, {})
    assert counted.guesses == 2 * 8  # in each step whether the inner loop runs, and whether it goes on


def test_loops_kinds_and_what_is_left_out():
    module = hlo.parse(PROGRAM)
    clock = read_clock(module, {}, GENERATIONS["v5e"])
    assert clock.by_kind == {"block matmuls": 3 * 100, "copies and layout": 3 * 7}
    assert [(o.name, o.times) for o in clock.operations] == [("fusion.1", 3), ("copy.1", 3)]
    assert clock.left_out == {"collective all-reduce": 1, "kernel dyn_kernel": 1}


DECODING = f"""HloModule jit_dispatch

%gathered (p: bf16[64,512], i: s32[8]) -> bf16[8,512] {{
  %p = bf16[64,512] parameter(0)
  %i = s32[8] parameter(1)
  ROOT %gather.1 = bf16[8,512] gather(%p, %i), offset_dims={{1}}
}}

%scattered (p: bf16[64,512], i: s32[8], u: bf16[8,512]) -> bf16[64,512] {{
  %p = bf16[64,512] parameter(0)
  %i = s32[8] parameter(1)
  %u = bf16[8,512] parameter(2)
  ROOT %scatter.1 = bf16[64,512] scatter(%p, %i, %u), to_apply=%add
}}

%product (p: bf16[8,512]) -> bf16[8,8] {{
  %p = bf16[8,512] parameter(0)
  ROOT %dot.1 = bf16[8,8] convolution(%p, %p), dim_labels=bf_oi->bf, metadata={{op_name="attention/attend/dot"}}
}}

%body (s: (s32[], bf16[64,512], s32[8])) -> (s32[], bf16[64,512], s32[8]) {{
  %s = (s32[], bf16[64,512], s32[8]) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %pool = bf16[64,512] get-tuple-element(%s), index=1
  %i = s32[8] get-tuple-element(%s), index=2
  %start = (bf16[64,512], bf16[64,512], u32[]) copy-start(%pool)
  %read = bf16[8,512] fusion(%pool, %i), kind=kCustom, calls=%gathered, metadata={{op_name="x/cache_pages/gather"}}
  %score = bf16[8,8] fusion(%read), kind=kOutput, calls=%product, {ESTIMATE % 100}
  %small = bf16[8,8] add(%score, %score), {ESTIMATE % 3}
  %done = bf16[64,512] copy-done(%start)
  %write = bf16[64,512] fusion(%done, %i, %read), kind=kCustom, calls=%scattered
  ROOT %out = (s32[], bf16[64,512], s32[8]) tuple(%n, %write, %i)
}}

%condition (s: (s32[], bf16[64,512], s32[8])) -> pred[] {{
  %s = (s32[], bf16[64,512], s32[8]) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %block = s32[] constant(512)
  %entries = s32[] multiply(%n, %block)
  ROOT %less = pred[] compare(%entries, %block), direction=LT
}}

ENTRY %main (s: (s32[], bf16[64,512], s32[8])) -> (s32[], bf16[64,512], s32[8]) {{
  %s = (s32[], bf16[64,512], s32[8]) parameter(0)
  ROOT %while.1 = (s32[], bf16[64,512], s32[8]) while(%s), condition=%condition, body=%body, \
metadata={{op_name="jit/while/body/attention/attend/while"}}
}}
"""


def test_a_decoding_step_by_hand():
    """A loop over two blocks of pages, whose condition has a 512 that is no trip count, at 546 bytes a cycle.

    A round reads and writes 8 pages of 1,024 bytes, at 15 cycles each time, beside the transfer of all 64 pages, which
    takes 120: from the product's 100 and what follows it, 2 remain to wait for.
    """
    module = dataclasses.replace(hlo.parse(DECODING), unknown_trips=2)
    clock = read_clock(module, {}, GENERATIONS["v5e"])
    assert [round(size / 546) for size in (8 * 1024, 64 * 1024)] == [15, 120]
    waits = 120 - (15 + 100 + 3)
    assert clock.by_kind == {
        "attention other": 2 * (100 + 3 + 15),  # what has no place of its own is of the loop's kind
        "cache pages": 2 * 15,
        "waiting for transfers": 2 * waits,
    }
    assert clock.cycles == 2 * (15 + 100 + 3 + waits + 15) and not clock.left_out


def test_a_kernel_is_found_under_the_name_of_its_equal():
    """The compiler dumps equal kernels once; attributes of a kernel are broken over lines."""
    module, v5e = hlo.parse(PROGRAM), GENERATIONS["v5e"]
    costs = kernel_costs(module, FOLDER, v5e, 1)
    cost = costs["dyn_kernel.2"]
    assert cost.memory_cycles == round(524_800 / 819e9 * 1.5e9) == 961
    assert cost.cycles == max(cost.bundles, 961)
    report = clock_report(read_clock(module, costs, v5e), v5e)
    assert report["cycles_by_kind"]["attention kernels"] == cost.cycles
    assert report["seconds"] == (3 * 107 + cost.cycles) / 1.5e9


def test_tables_of_splash_are_causal_and_name_the_nearest_block():
    """Two rows of four blocks of queries over two of keys, as selected queries over shared keys may have."""
    by_query = run_time_tables("splash_mha_fwd", ((1, 8, 2),), 2)
    assert by_query[1][0, :4].tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert by_query[0][0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 1], [2, 2], [2, 2], [2, 3], [2, 3]]
    by_key = run_time_tables("splash_mha_dkv", ((1, 4, 4),), 2)
    assert by_key[1][0].tolist() == [[1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_attainable_time_by_hand():
    """Of debug's head: three products, each bound by arithmetic or by memory."""
    config = presets.get("debug").config
    sizes: dict[str, int] = dict.fromkeys(("slice", "data", "fsdp", "context", "tensor"), 1)
    v5e, model = GENERATIONS["v5e"], config.model
    parts = attainable_seconds(config, sizes, v5e)
    m, d, v = config.train.batch_size * model.context_length, model.d_model, model.vocab_size
    fill = lambda size: -(-size // 128) * 128  # noqa: E731
    moved = 4 * (m * d + d * v + m * v) / 819e9
    assert m % 128 == 0 and parts["head"] == pytest.approx(3 * max(2 * m * fill(d) * fill(v) / 197e12, moved))
    rows = dataclasses.replace(config.train, batch_size=2 * config.train.batch_size)
    twice = attainable_seconds(dataclasses.replace(config, train=rows), sizes, v5e)
    assert parts["head"] < twice["head"] < 2 * parts["head"]  # its weights are moved once
    assert twice["optimiser"] == parts["optimiser"]


def test_a_dump_needs_the_clock():
    from mor_jax.cli.plan import run

    with pytest.raises(UserError, match="--clock-dump"):
        run(["debug", "--clock-dump", "anywhere"])

"""Collectives of HLO text: kinds, bytes and reach worked out by hand, loops multiplied out."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mor_jax.config import MeshConfig
from mor_jax.mesh.mesh import make_mesh
from mor_jax.plan.collectives import bytes_by_kind, collectives
from mor_jax.plan.hlo import parse

PROGRAM = """\
HloModule step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%goes_on (s.1: (s32[], f32[16])) -> pred[] {
  %s.1 = (s32[], f32[16]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (s.2: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s.2 = (s32[], f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%s.2), index=1
  %sum.2 = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %next = (s32[], f32[16]{0}) tuple(%counter, %sum.2)
}

ENTRY %main (p: bf16[8,4], q: f32[16]) -> f32[4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %gather-start = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
dimensions={0}, metadata={op_name="jit(step)/gather"}
  %gather-done = bf16[16,4]{1,0} all-gather-done(%gather-start)
  %start = (s32[], f32[16]{0}) tuple(%q, %q)
  %while = (s32[], f32[16]{0}) while(%start), condition=%goes_on, body=%body
  %scattered = f32[4]{0} reduce-scatter(%q), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%sum
  %alone = f32[16]{0} all-reduce(%q), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  %moved = f32[16]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0},{2,2}}
  ROOT %everyone = f32[4]{0} all-to-all(%scattered), replica_groups={}
}
"""


def test_kinds_bytes_and_loops():
    found = {item.kind: item for item in collectives(parse(PROGRAM), devices=8)}
    assert {kind: (c.group_size, c.executions, c.bytes) for kind, c in found.items()} == {
        "all-gather": (2, 1, 64),  # half of bf16[16, 4]
        "all-reduce": (4, 5, 2 * 48),  # 3/4 of f32[16], twice
        "reduce-scatter": (4, 1, 48),
        "collective-permute": (2, 1, 64),
        "all-to-all": (8, 1, 14),  # 7/8 of f32[4]
    }
    assert found["all-gather"].op_name == "jit(step)/gather"


def test_bytes_are_split_by_reach():
    """Two slices: devices 0..3 and 4..7."""
    totals = bytes_by_kind(collectives(parse(PROGRAM), devices=8, slices=2))
    assert totals["all-gather"] == {"count": 1, "bytes": 0, "bytes_across": 64}
    assert totals["all-reduce"] == {"count": 5, "bytes": 5 * 96, "bytes_across": 0}
    assert totals["all-to-all"]["bytes_across"] == 14


@pytest.mark.parametrize(
    ("groups", "size", "across"),
    [
        ("[4,2]<=[8]", 2, False),
        ("[4,2]<=[2,4]T(1,0)", 2, True),
        ("[4,2]<=[2,2,2]T(0,2,1)", 2, False),
        ("mesh['a'=2,'b'=4] {'a'}", 2, True),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8, True),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2, True),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", 2, False),
        ("mesh['a'=8] {'a':(1)2}", 2, True),
    ],
)
def test_every_notation_of_groups(groups, size, across):
    text = PROGRAM.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", f"replica_groups={groups}")
    found = next(c for c in collectives(parse(text), devices=8, slices=2) if c.kind == "all-gather")
    assert (found.group_size, found.across) == (size, across)


def test_groups_in_an_unknown_notation_are_an_error():
    with pytest.raises(ValueError, match="replica groups of gather-start cannot be read"):
        collectives(parse(PROGRAM.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups=?")), devices=8)


TPU_PROGRAM = """HloModule step
%all-reduce-scatter.3 (input: bf16[256,64]) -> bf16[128,64] {
  %input = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[256,64]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = bf16[128,64]{1,0} dynamic-slice(%all-reduce.1, %index), dynamic_slice_sizes={128,64}
}

ENTRY %main (x: bf16[256,64]) -> bf16[128,64] {
  %x = bf16[256,64]{1,0} parameter(0)
  %token = token[] after-all()
  %mine = bf16[128,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %send = (bf16[128,64]{1,0}, u32[], token[]) send(%mine, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[128,64]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %done = bf16[128,64]{1,0} bitcast(%mine)
}
"""  # noqa: E501


def test_what_tpu_compilers_write_for_reduce_scatter_and_between_slices():
    """A fusion named all-reduce-scatter is one; between slices a send stands for the exchange."""
    size = 128 * 64 * 2
    assert bytes_by_kind(collectives(parse(TPU_PROGRAM), devices=4, slices=2)) == {
        "all-reduce": {"count": 1, "bytes": 0, "bytes_across": size},  # two slices: 2 x (2 - 1) / 2 of what is sent
        "reduce-scatter": {"count": 1, "bytes": size, "bytes_across": 0},
    }


def test_a_compiled_program():
    """Rows over 8 devices, one product with a matrix that fsdp splits, in a scan of 3 steps."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    rows, width = (jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp")))
    x_BD = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    w_LDD = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=width)

    def layers(x_BD, w_LDD):
        return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(x @ w, rows), None), x_BD, w_LDD)[0]

    text = jax.jit(layers).lower(x_BD, w_LDD).compile().as_text() or ""
    assert bytes_by_kind(collectives(parse(text), 8)) == {
        "all-gather": {"count": 3, "bytes": 3 * 32 * 32 * 4 * 7 // 8, "bytes_across": 0}
    }


CHAIN_PROGRAM = """HloModule step
%starts (w: bf16[8,64]) -> (bf16[8,64], bf16[32,64], u32[]) {
  %w.1 = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = bf16[32,64]{1,0} all-gather(%w.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, CHAIN
  ROOT %begun = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (w: bf16[8,64], x: bf16[16,16]) -> bf16[16,16] {
  %w.2 = bf16[8,64]{1,0} parameter(0)
  %x.2 = bf16[16,16]{1,0} parameter(1)
  %all-gather.2 = bf16[32,64]{1,0} all-gather(%w.2), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, CHAIN
  ROOT %product = bf16[16,16]{1,0} dot(%x.2, %x.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%ends (w: bf16[8,64]) -> bf16[32,64] {
  %w.3 = bf16[8,64]{1,0} parameter(0)
  %all-gather.3 = bf16[32,64]{1,0} all-gather(%w.3), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, CHAIN
  ROOT %ended = bf16[32,64]{1,0} custom-call(%w.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[8,64], x: bf16[16,16]) -> bf16[32,64] {
  %w = bf16[8,64]{1,0} parameter(0)
  %x = bf16[16,16]{1,0} parameter(1)
  %async-collective-start = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]) fusion(%w), kind=kCustom, calls=%starts
  %fusion.1 = bf16[16,16]{1,0} fusion(%w, %x), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %async-collective-done = bf16[32,64]{1,0} fusion(%w), kind=kCustom, calls=%ends
}
""".replace("CHAIN", 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}')  # noqa: E501


def test_a_collective_that_tpu_runs_beside_arithmetic_counts_once():
    """A chain of three fusions holds three copies of one all-gather."""
    assert bytes_by_kind(collectives(parse(CHAIN_PROGRAM), devices=4)) == {
        "all-gather": {"count": 1, "bytes": 3 * 8 * 64 * 2, "bytes_across": 0}
    }

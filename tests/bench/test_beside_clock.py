"""A TPU's trace beside its compiler's clock: events made by hand, a program whose cycles are known."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import Mesh

from mor_jax import presets
from mor_jax.bench import beside_clock as module
from mor_jax.bench.beside_clock import beside_clock
from mor_jax.bench.profile import kernel_events
from mor_jax.bench.run import clock_table
from mor_jax.mesh.axes import BATCH_AXES
from mor_jax.mesh.devices import CHIPS

ESTIMATE = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
PROGRAM = f"""HloModule jit_step

%fused (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8] parameter(0)
  ROOT %dot.1 = bf16[8,8] convolution(%p, %p), dim_labels=bf_io->bf, metadata={{op_name="block/ffn/dot"}}
}}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8] parameter(0)
  %start = (bf16[8,8], bf16[8,8], u32[]) copy-start(%p)
  %fusion.1 = bf16[8,8] fusion(%p), kind=kOutput, calls=%fused, {ESTIMATE % 3000}
  %done = bf16[8,8] copy-done(%start)
  %all-reduce.2 = bf16[8,8] all-reduce(%fusion.1), to_apply=%add
  ROOT %copy.3 = bf16[8,8] copy(%all-reduce.2), {ESTIMATE % 1500}
}}
"""
OPS = (  # name of the event, microseconds
    ("%fusion.1 = bf16[8,8]{1,0} fusion(%p), kind=kOutput", 6.0),
    ("done", 1.5),
    ("%all-reduce.2 = bf16[8,8] all-reduce(%fusion.1)", 4.0),
    ("copy.3", 0.5),
    ("%all-gather.9 = bf16[8,8] all-gather(%x)", 2.0),
    ("infeed.7", 0.25),
)


def _trace():
    """Two steps of one device; other lines have the same time again."""
    events = [SimpleNamespace(name=n, stats=(), start_ns=0.0, duration_ns=t * 1e3) for n, t in OPS] * 2
    lines = [SimpleNamespace(name=name, events=events) for name in ("XLA Modules", "XLA Ops")]
    return SimpleNamespace(planes=[SimpleNamespace(name="/device:TPU:0", lines=lines)])


@pytest.fixture
def one_device():
    return Mesh([[[jax.devices()[0]]]], BATCH_AXES)


def test_measured_beside_predicted_by_hand(tmp_path, monkeypatch, one_device):
    """At 1.5 GHz 3,000 and 1,500 cycles are 2 and 1 microseconds."""
    monkeypatch.setattr(module, "chip_of", lambda _: CHIPS["v5e"])
    config = presets.get("debug").config
    events = kernel_events(_trace())
    assert [event.operation for event in events[:3]] == ["fusion.1", "done", "all-reduce.2"] and len(events) == 12
    beside = beside_clock(events, PROGRAM, tmp_path, config, one_device, 2)
    assert beside is not None
    micro = lambda pair: tuple(round(1e6 * pair[f"{name}_seconds"], 6) for name in ("measured", "predicted"))  # noqa: E731
    assert {kind: micro(pair) for kind, pair in beside["kinds"].items()} == {
        "block matmuls": (6.0, 2.0),
        "copies and layout": (0.5, 1.0),
        "waiting for transfers": (1.5, 0.0),
        "communication": (6.0, 0.0),  # one of another program, by its name
        "not in the program": (0.25, 0.0),
    }
    assert micro(beside["together"]) == (8.0, 3.0)
    assert [row["name"] for row in beside["operations"]] == ["fusion.1", "done", "copy.3"]
    lines = [line.split() for line in clock_table("tiny", beside).splitlines()]
    assert ["block", "matmuls", "0.006", "0.002", "3.00"] in lines
    assert ["together,", "of", "what", "has", "a", "clock", "0.008", "0.003", "2.67"] in lines


def test_without_a_clock_the_log_says_so(tmp_path, one_device, caplog):
    config = presets.get("debug").config
    with caplog.at_level("INFO"):
        assert beside_clock((), PROGRAM, tmp_path, config, one_device, 2) is None
    assert "cpu: no clock to compare with; programs for v5e, v5p, v6e, tpu7x carry cycles" in caplog.text

"""What experiments/scaling times and in which order, what its tables mark, and its driver on fake CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from experiment_script import EXPERIMENTS, load_script
from mor_jax.bench.communication import communication, union
from mor_jax.bench.profile import kernel_events

LAYOUTS = load_script("scaling/layouts")
TABLE = load_script("scaling/scaling_table")
ONE_CASE = load_script("scaling/one_case")
Case = LAYOUTS.Case


def test_layouts_that_a_number_of_cards_or_a_model_does_not_allow_are_left_out():
    allowed = {
        (size, layout, cards)
        for size in ("360m", "1.7b")
        for layout in LAYOUTS.LAYOUTS
        for cards in (2, 3, 4, 8)
        if LAYOUTS.why_not(Case(size, "mor", layout, cards)) is None
    }
    assert {cards for size, layout, cards in allowed if (size, layout) == ("1.7b", "fsdp-tensor2")} == {2, 4, 8}
    assert {cards for size, layout, cards in allowed if (size, layout) == ("1.7b", "slice2-fsdp")} == {4, 8}
    assert {cards for size, layout, cards in allowed if (size, layout) == ("360m", "context2")} == {2, 4, 8}
    assert LAYOUTS.why_not(Case("360m", "vanilla", "fsdp-tensor2", 8)) == (
        "model.num_heads=15 is not divisible by mesh.tensor=2"
    )
    assert LAYOUTS.why_not(Case("1.7b", "mor", "context2", 3)) == "3 cards are not a multiple of 2"


def test_a_case_has_a_cards_tokens_whatever_the_length_of_its_rows():
    short = Case("360m", "mor", "slice2-fsdp", 8).config()
    assert (short.train.batch_size, short.model.context_length) == (16, 2048)
    assert (short.mesh.slice, short.mesh.fsdp, short.model.recursion.num_recursions) == (2, 4, 3)
    long = Case("1.7b", "vanilla", "context2", 8, long=True).config()
    assert (long.train.batch_size, long.model.context_length, long.mesh.context) == (1, 8192, 2)
    assert long.model.routing.kind == "none"


def test_the_most_telling_cases_come_first_each_after_its_one_card():
    cases = LAYOUTS.ranked(("360m", "1.7b"), 8)
    names = [case.name for case in cases]
    assert names[:6] == [
        "360m-vanilla-one",
        "360m-vanilla-data-8",
        "360m-mor-one",
        "360m-mor-data-8",
        "360m-vanilla-fsdp-8",
        "360m-mor-fsdp-8",
    ]
    assert names[6] == "1.7b-vanilla-one" and names[12] == "360m-vanilla-data-8-processes"
    assert len(set(names)) == len(names)
    assert all(names.index(case.one_card.name) <= index for index, case in enumerate(cases))
    cards = [case.cards for case in cases if case.cards > 1]
    assert 8 not in cards[cards.index(4) :] and names.index("360m-mor-data-4") < names.index("360m-mor-fsdp-2")
    assert [case.name for case in LAYOUTS.ranked(("360m",), 1)][::2] == ["360m-vanilla-one", "360m-vanilla-one-long"]


def test_a_process_sees_its_cards_and_its_place(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    case = Case("360m", "mor", "fsdp", 4, per_card=True)
    assert ONE_CASE.environment_of(case, 3, "localhost:7", cpu=False) == {
        "CUDA_VISIBLE_DEVICES": "7",
        "JAX_COORDINATOR_ADDRESS": "localhost:7",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    one = ONE_CASE.environment_of(Case("360m", "mor", "fsdp", 4), 0, "localhost:7", cpu=False)
    assert one == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_fake_devices_of_one_process_have_threads_to_wait_in_several_collectives():
    together, alone = (
        ONE_CASE.environment_of(Case("debug", "vanilla", "context2", 8, each), 0, "localhost:7", cpu=True)
        for each in (False, True)
    )
    assert "device_count=8" in together["XLA_FLAGS"] and int(together["NPROC"]) > 2 * 8
    assert "device_count=1" in alone["XLA_FLAGS"] and "NPROC" not in alone


def test_a_failure_keeps_the_fatal_message_that_frames_of_cpp_follow():
    frames = [f"    @     0x7f0{index}  xla::cpu::ThunkExecutor::Execute<>()" for index in range(9)]
    fatal = ["F1201 rendezvous.cc:161] Termination timeout", "*** Check failure stack trace: ***"]
    assert ONE_CASE.last_words("\n".join(["compiling", *fatal, *frames, ""])).splitlines() == ["compiling", *fatal]
    assert ONE_CASE.last_words(" \n") == ""


TRACE = """
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_AllReduce_Sum_f32_RING_LL" } }
  event_metadata { key: 3 value { id: 3 name: "ncclDevKernel_AllGather_RING_LL" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { name: "Stream #1"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000000 stats { metadata_id: 1 str_value: "fusion.1" } }
    events { metadata_id: 1 offset_ps: 9000000000 duration_ps: 1000000000 stats { metadata_id: 1 str_value: "dot" } }
    events { metadata_id: 1 offset_ps: 20000000000 duration_ps: 1000000000 }
  }
  lines { name: "Stream #2"
    events { metadata_id: 2 offset_ps: 3000000000 duration_ps: 3000000000
             stats { metadata_id: 1 str_value: "all-reduce-start.5" } }
    events { metadata_id: 3 offset_ps: 5000000000 duration_ps: 2000000000 }
  }
}
planes { name: "/device:GPU:1"
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { events { metadata_id: 1 duration_ps: 4000000000 stats { metadata_id: 1 str_value: "fusion.1" } } }
}
planes { name: "/host:CPU" }
"""


def test_exposed_communication_is_what_no_computation_runs_beside():
    """Card 0 computes in 0-4 and 9-10 ms, reduces in 3-6, gathers in 5-7; two steps were traced."""
    first, second = communication(kernel_events(ProfileData.from_text_proto(TRACE)), steps=2)
    assert (first["device"], second["device"]) == ("/device:GPU:0", "/device:GPU:1")
    assert (first["seconds"], first["exposed_seconds"]) == pytest.approx((0.002, 0.0015))
    assert first["idle_seconds"] == pytest.approx(0.001)
    assert first["kinds"]["all-reduce"] == pytest.approx({"seconds": 0.0015, "exposed_seconds": 0.001})
    assert first["kinds"]["all-gather"] == pytest.approx({"seconds": 0.001, "exposed_seconds": 0.001})
    assert (second["seconds"], second["exposed_seconds"], second["idle_seconds"]) == (0, 0, 0)
    assert union([(5, 6), (1, 3), (2, 4), (4, 4.5)]) == [(1, 4.5), (5, 6)]


def _row(size: str, family: str, layout: str, cards: int, efficiency: float | None) -> dict:
    case = Case(size, family, layout, cards)
    measured = {"error": "first\nout of memory"}
    if efficiency is not None:
        measured = {
            "tokens_per_second": 1e5,
            "step_seconds": 0.1,
            "step_seconds_spread": 0.02,
            "peak_bytes": 2**31,
            "collectives": {"all-reduce": {"count": 1, "bytes": 3_000_000, "bytes_across": 500_000}},
            "profile": {
                "communication": [
                    {"seconds": 0.01, "exposed_seconds": share, "idle_seconds": 0.0} for share in (0.004, 0.006)
                ]
            },
        }
    return {"name": case.name, "case": vars(case), "efficiency": efficiency, "measured": measured}


def test_tables_mark_what_falls_short_and_say_what_is_missing():
    rows = [
        _row("360m", "vanilla", "data", 4, 0.93),
        _row("360m", "mor", "data", 4, 0.925),
        _row("1.7b", "vanilla", "fsdp", 4, 0.93),
        _row("1.7b", "mor", "fsdp", 4, None),
    ]
    lines = TABLE.efficiency_table(rows).splitlines()
    assert lines[2:] == [
        "| 360m | data | one | vanilla | 0.930 |",
        "| 360m | data | one | mor | 0.925 (v) |",
        "| 1.7b | fsdp | one | vanilla | 0.930 < |",
        "| 1.7b | fsdp | one | mor | failed |",
    ]
    times = TABLE.time_table(rows).splitlines()
    assert times[2] == "| 360m-vanilla-data-4 | 100,000 | 100.0 | 2% | 3.5 | 10.0 | 5.0 | 5.0% | 0.0 | 2.0 |"
    assert "failed: out of memory" in times[5]
    missing = TABLE.left_out(rows)
    assert "num_heads=15 is not divisible by mesh.tensor=2): 360m-vanilla-fsdp-tensor2-4" in missing
    assert "360m-vanilla-fsdp-4" in missing.split("Not run: ")[1] and "360m-mor-data-4," not in missing


@pytest.mark.slow
def test_the_driver_times_cases_goes_on_and_stops_in_time(tmp_path: Path):
    script = EXPERIMENTS / "scaling" / "scale.py"
    base = [sys.executable, str(script), "--cards", "2", "--cpu", "--sizes", "debug", "--steps", "2"]
    base += ["--only", "mor-data", "--out", str(tmp_path)]

    def run(seconds: int) -> str:
        done = subprocess.run([*base, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        return done.stdout

    assert "debug-mor-data-2: not started" in run(5) and not list(tmp_path.iterdir())
    assert "2 of 2 cases have a result" in run(500)
    one = json.loads((tmp_path / "debug-mor-data-2.json").read_text(encoding="utf-8"))
    each = json.loads((tmp_path / "debug-mor-data-2-processes.json").read_text(encoding="utf-8"))
    assert (one["measured"]["processes"], each["measured"]["processes"]) == (1, 2)
    assert one["measured"]["collectives"] == each["measured"]["collectives"]
    assert one["measured"]["metrics"]["loss"] == pytest.approx(each["measured"]["metrics"]["loss"], rel=1e-5)
    assert [device["process"] for device in each["measured"]["profile"]["communication"]] == [0, 1]
    assert os.path.getmtime(tmp_path / "debug-mor-data-2.json") < os.path.getmtime(
        tmp_path / "debug-mor-data-2-processes.json"
    )
    assert "2 of 2" in run(5)  # nothing is timed again

"""Metric writers, the ledger, throughput against a known peak, and what is shown while training."""

import io
import json

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tiny_runs import tiny_config

from mor_jax.errors import UserError
from mor_jax.runs.metrics import JsonlWriter, make_writers, read_metrics
from mor_jax.train import goodput
from mor_jax.train.goodput import ACTIVITIES, Ledger, Throughput, describe_peak
from mor_jax.train.progress import Reporter


class _Device:
    def __init__(self, device_kind: str) -> None:
        self.device_kind = device_kind


def test_lines_are_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss": 2.5, "tokens_per_depth": [0.0, 1.0]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "tokens_per_depth": [0.0, 1.0]}\n'
    writer.close()


def test_resuming_drops_later_and_cut_off_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    writer = JsonlWriter(path, 2)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_foreign_metrics_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (b"hello", b'{"loss": 1.0}', b"3", b"\xff\xfe{}", b"\0\0"):
        path.write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
            read_metrics(path)


def test_tensorboard_gets_scalars_and_the_entries_of_lists(tmp_path):
    writers = make_writers(tmp_path, restored_step=0, tensorboard=True)
    writers.write(1, {"loss": 2.5, "load_R": [0.25, 0.75]})
    writers.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, tags = path.read_bytes(), {}
    while data:  # a record is an 8-byte length, a 4-byte checksum, the event, a 4-byte checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        tags |= {value.tag: value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert tags == {"loss": 2.5, "load_R/0": 0.25, "load_R/1": 0.75}
    assert (tmp_path / "metrics.jsonl").exists()


def test_other_processes_write_nothing(tmp_path):
    make_writers(tmp_path, restored_step=0, tensorboard=True, primary=False).write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_charges_each_activity(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 10.0, 10.0])
    monkeypatch.setattr(goodput.time, "monotonic", lambda: next(clock))
    ledger = Ledger()
    with ledger.measure("compile"):
        pass
    with ledger.measure("step"):
        pass
    assert ledger.seconds == {**dict.fromkeys(ACTIVITIES, 0.0), "compile": 2.0, "step": 0.5}
    assert ledger.goodput == pytest.approx(0.05)
    assert ledger.summary().startswith("seconds: init 0.0, compile 2.0")


def test_throughput_and_mfu_against_a_named_peak(monkeypatch):
    monkeypatch.setattr(goodput, "_train_flops_per_token", lambda config: 1e9)
    ledger, config = Ledger(), tiny_config()
    throughput = Throughput(config, ledger, [_Device("TPU v5e")] * 2)
    ledger.seconds["step"], ledger.seconds["data_wait"] = 1.5, 0.5
    values = throughput.read(10)
    tokens_per_second = 10 * 8 * 32 / 2.0
    assert values["tokens_per_second"] == pytest.approx(tokens_per_second)
    assert values["data_wait_seconds"] == 0.5
    assert values["mfu"] == pytest.approx(tokens_per_second * 1e9 / (2 * 197e12))


def test_an_unknown_device_has_no_mfu():
    throughput = Throughput(tiny_config(), Ledger(), [_Device("abacus")])
    assert "mfu" not in throughput.read(1)
    assert describe_peak(_Device("abacus")) == "unknown device"


def test_logs_get_one_plain_line_and_a_terminal_a_bar():
    for is_terminal in (False, True):
        text = io.StringIO()
        reporter = Reporter(10, 0, Console(file=text, force_terminal=is_terminal, width=160, soft_wrap=True))
        reporter.log(2, {"loss": 1.23456, "tokens_per_second": 1234.5})
        reporter.close()
        if is_terminal:
            assert "2/10" in text.getvalue() and "loss 1.2346" in text.getvalue()
        else:
            assert text.getvalue() == "step 2/10  loss 1.2346  1,234 tok/s\n"

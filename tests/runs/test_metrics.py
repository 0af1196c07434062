"""Metric writers, the ledger, throughput against a known peak, and what is shown while training."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console
from tiny_runs import tiny_config  # pyright: ignore[reportMissingImports]

from mor_jax.errors import UserError
from mor_jax.runs.metrics import JsonlWriter, read_metrics
from mor_jax.train import goodput
from mor_jax.train.goodput import ACTIVITIES, Ledger, Throughput, describe_peak
from mor_jax.train.progress import Reporter, SafeStream, describe_rising_rate


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


def test_json_lines_hold_no_nan(tmp_path, caplog):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss": 1.0, "a": math.nan, "load_R": [0.5, math.inf], "b": 2})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0, "b": 2}\n'
    assert caplog.messages == ["step 1: a, load_R not finite, and left out of metrics.jsonl"]


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
    monkeypatch.setattr(goodput, "run_flops", lambda config, start, end: (end - start) * 8 * 32 * 1e9)
    ledger, config = Ledger(), tiny_config()
    throughput = Throughput(config, ledger, [_Device("TPU v5e")] * 2)
    ledger.seconds["step"], ledger.seconds["data_wait"] = 1.5, 0.5
    values = throughput.read(3, 13)
    tokens_per_second = 10 * 8 * 32 / 2.0
    assert values["tokens_per_second"] == pytest.approx(tokens_per_second)
    assert values["data_wait_seconds"] == 0.5
    assert values["mfu"] == pytest.approx(tokens_per_second * 1e9 / (2 * 197e12))


def test_an_unknown_device_has_no_mfu():
    throughput = Throughput(tiny_config(), Ledger(), [_Device("abacus")])
    assert "mfu" not in throughput.read(0, 1)
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


class _Closed(io.StringIO):
    """A terminal that is closed after so many writes."""

    def __init__(self, writes, error):
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe"), ValueError()])
def test_a_reader_who_leaves_does_not_stop_a_run(error, caplog):
    text = _Closed(2, error)
    stream = SafeStream(text)
    for _ in range(5):
        assert stream.write("line") == 4
        stream.flush()
    assert text.getvalue() == "lineline" and len(caplog.messages) == 1 and not stream.isatty()


def _rising(old_steps, new_steps, start, **optimizer):
    config = tiny_config(steps=old_steps)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **optimizer))
    new = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=new_steps))
    return describe_rising_rate(config, new, start)


def test_a_longer_run_says_that_its_rate_rises_again():
    """The peak is 0.01; of 10 steps the last two fall, to 0.01 and 0.005 in steps 9 and 10; of 20 the last four."""
    assert _rising(10, 20, 10) == (
        "the learning rate rises again: step 10 had 5.00e-03, step 11 has 1.00e-02, as train.steps=10 had decayed it "
        "and train.steps=20 does not yet"
    )
    assert "rises again: step 10 had" in (_rising(10, 20, 10, schedule="cosine") or "")


@pytest.mark.parametrize(
    ("old", "new", "start", "optimizer"),
    [
        (10, 10, 10, {}),  # nothing is left to do
        (10, 20, 0, {}),  # a start
        (10, 20, 8, {}),  # the decay had not begun
        (10, 20, 9, {}),  # and nor had a step of it been taken
        (10, 20, 1, {}),  # in warm-up it rises in any case
        (10, 11, 10, {"decay_share": 0.9}),  # it goes on falling
        (10, 20, 10, {"decay_share": 0.0}),
    ],
)
def test_otherwise_it_says_nothing(old, new, start, optimizer):
    assert _rising(old, new, start, **optimizer) is None

"""The watchdog names what hangs, dumps every stack once, and is quiet otherwise."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TinyDataset, tiny_config

from mor_jax.train.loop import train
from mor_jax.train.watchdog import Watchdog


def _sleep_in_a_function_with_a_name(seconds: float) -> None:
    time.sleep(seconds)


def test_a_hang_is_named_once_with_the_stacks_of_all_threads(tmp_path, caplog):
    with (tmp_path / "stacks.txt").open("w") as file, Watchdog(0.2, file) as watchdog:
        watchdog.reached("the save of step 7")
        other = threading.Thread(target=_sleep_in_a_function_with_a_name, args=(0.8,))
        other.start()
        other.join()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the save of step 7 has taken 0 s, more than train.watchdog_seconds=0.2")
    stacks = (tmp_path / "stacks.txt").read_text()
    assert stacks.count("_sleep_in_a_function_with_a_name") == 1 and "test_a_hang_is_named_once" in stacks


def test_progress_keeps_it_quiet_and_a_second_hang_is_named_too(tmp_path, caplog):
    with (tmp_path / "stacks.txt").open("w") as file, Watchdog(0.4, file) as watchdog:
        for step in range(10):
            watchdog.reached(f"step {step}")
            time.sleep(0.06)
        assert caplog.messages == []
        for step in (10, 11):
            watchdog.reached(f"step {step}")
            time.sleep(0.6)
    assert [message.split(" has")[0] for message in caplog.messages] == ["step 10", "step 11"]


def test_zero_is_off():
    before = threading.active_count()
    with Watchdog(0) as watchdog:
        watchdog.reached("step 1")
        assert threading.active_count() == before


@pytest.mark.slow
def test_a_step_of_a_run_that_waits_for_its_data_is_named(tmp_path, caplog, capfd):
    """The second step waits; the first, which compiles, may be named as well on a slow machine."""

    class Slow(TinyDataset):
        def batch(self, step: int) -> Any:
            if step == 1 and self.steps is None:
                _sleep_in_a_function_with_a_name(3.0)
            return super().batch(step)

    config = tiny_config(Path(tmp_path), steps=2, watchdog_seconds=2.0)
    train(config, make_dataset=lambda _, *, split, batch_size, **rest: Slow(config, split, batch_size))
    assert any(message.startswith("step 2 has taken") for message in caplog.messages)
    assert "_sleep_in_a_function_with_a_name" in capfd.readouterr().err

"""The loop: what a run leaves behind, resuming it bit for bit, stopping, refusing, and the guard."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import (
    NumberTokenizer,
    TinyDataset,
    dataset_maker,
    make_batch,
    read_lines,
    saved_fingerprints,
    tiny_config,
    with_train,
)

from mor_jax.config import Config, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.train import loop
from mor_jax.train.loop import DivergedError, train


def run(config: Config, record: Path | None = None, make_dataset: Any = None) -> Path:
    make_dataset = make_dataset or dataset_maker(config, record)
    return train(config, make_dataset=make_dataset, devices=jax.devices()[:1])


def stopping_dataset(config: Config, at: int, action: Any, record: Path | None = None) -> Any:
    """The tiny data set that does something before it gives the batch of step ``at``."""

    class Stopping(TinyDataset):
        def batch(self, step: int) -> Any:
            if self.steps is None and step == at:
                action()
            return super().batch(step)

    return lambda _, *, split, batch_size, **rest: Stopping(config, split, batch_size, record)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of six steps without interruption, and the record of its batches."""
    folder = tmp_path_factory.mktemp("straight")
    record = folder / "batches.txt"
    return run(tiny_config(folder, eval_every=2, pictures=True), record), record


def test_a_run_leaves_config_metrics_checkpoints_and_pictures(straight):
    folder, _ = straight
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "loss.png", "depth.png", "routing.html"):
        assert (folder / name).stat().st_size > 0
    lines = read_lines(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "validation_gap" in line] == [2, 4, 6]
    running = [line["boundaries_R"] for line in lines]
    assert all(boundaries[0] == 0.0 for boundaries in running) and len({b[1] for b in running}) == 6
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "6"]


def test_two_interruptions_change_nothing(straight, tmp_path):
    """Stopped by SIGTERM after step 2, broken in step 5 after the checkpoint of step 3, then finished."""
    config, record = tiny_config(tmp_path, eval_every=2), tmp_path / "batches.txt"
    run(config, make_dataset=stopping_dataset(config, 1, lambda: os.kill(os.getpid(), signal.SIGTERM), record))
    assert [line["step"] for line in read_lines(tmp_path / "tiny")] == [1, 2]

    def crash() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(config, make_dataset=stopping_dataset(config, 5, crash, record))
    folder = run(config, record)
    assert read_lines(folder) == read_lines(straight[0])
    assert saved_fingerprints(folder, 6) == saved_fingerprints(straight[0], 6)
    batches = [set(path.read_text().splitlines()) for path in (record, straight[1])]
    ahead = config.train.batch_size  # one batch may be read ahead
    assert batches[0] >= batches[1] and len(batches[0]) <= len(batches[1]) + ahead


@pytest.fixture(params=[signal.SIGUSR1, signal.SIGHUP])
def number(request):
    """A signal that is not ignored from the start, as SIGHUP is where the tests run under `nohup`."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_what_slurm_and_a_closed_terminal_send_saves(tmp_path, capsys, number):
    """Twice, as a closed terminal does."""
    config = tiny_config(tmp_path, save_every=0)
    act = lambda: [os.kill(os.getpid(), number) for _ in range(2)]  # noqa: E731
    folder = run(config, make_dataset=stopping_dataset(config, 1, act))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert f"{number.name}: saved at step 2; the same command continues" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(run(config))] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_extended_and_says_that_its_rate_rises(tmp_path, capsys):
    config = tiny_config(tmp_path, steps=10)  # the tenth step has half of the peak
    run(config)
    lines = read_lines(run(with_train(config, steps=12)))
    assert capsys.readouterr().out.count("rises again: step 10 had 5.00e-03, step 11 has 1.00e-02") == 1
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["learning_rate"] for line in lines[9:]] == pytest.approx([5e-3, 1e-2, 5e-3])


def test_another_configuration_is_refused_by_field_and_touches_nothing(straight):
    folder, _ = straight
    before = (folder / "config.json").read_bytes()
    config = tiny_config(folder.parent, eval_every=1, seed=5)
    with pytest.raises(UserError, match=r"another configuration: train.seed: 0 -> 5 \("):
        run(config)
    assert (folder / "config.json").read_bytes() == before


def test_other_data_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    run(config)

    class OtherTokenizer(NumberTokenizer):
        def save(self, path: Path) -> None:
            path.write_text("another tokenizer")

    class Other(TinyDataset):
        hash = property(lambda self: "other", lambda self, value: None)
        tokenizer = property(lambda self: OtherTokenizer(), lambda self, value: None)

    kept = {name: (tmp_path / "tiny" / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    with pytest.raises(UserError, match=r"trained on other data: .* had the hash tiny, now other"):
        run(
            with_train(config, steps=8),
            make_dataset=lambda _, *, split, batch_size, **rest: Other(config, split, batch_size),
        )
    assert {name: (tmp_path / "tiny" / name).read_bytes() for name in kept} == kept


def test_a_folder_in_which_another_run_trains_is_refused_and_left_alone(tmp_path):
    """Two runs would write the same checkpoints, and each would take the other's save for a half-written one."""
    config, refusals = tiny_config(tmp_path, save_every=2), []
    half = tmp_path / "tiny" / "checkpoints" / "9.orbax-checkpoint-tmp"

    def start_another() -> None:
        half.mkdir(parents=True)
        with pytest.raises(UserError, match=rf"tiny is being trained by process {os.getpid()} on \S+: wait") as error:
            run(config)
        refusals.append(error)
        assert half.is_dir()
        half.rmdir()

    folder = run(config, make_dataset=stopping_dataset(config, 2, start_another))
    assert len(refusals) == 1 and [line["step"] for line in read_lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert run(config) == folder  # the lock went with the run


def test_a_refused_start_leaves_nothing_behind(tmp_path):
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("data.source='nowhere' does not exist")

    with pytest.raises(UserError, match="nowhere"):
        run(tiny_config(tmp_path), make_dataset=refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves behind
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(straight, tmp_path, caplog):
    config = tiny_config(tmp_path)
    folder = run(config)
    wanted = read_lines(folder)
    manifest = folder / "checkpoints" / "6" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:20])
    run(config)
    assert "checkpoint 6 is damaged" in caplog.text
    assert read_lines(folder) == wanted
    assert (folder / "checkpoints-damaged" / "6").is_dir()
    gc.collect()


def test_the_guard_stops_with_the_facts_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, save_every=2)
    compile_train_step = loop.compile_train_step

    def poisoned(*arguments: Any) -> Any:
        executable = compile_train_step(*arguments)

        def step(state: Any, batch: Any) -> Any:
            done = int(state.step) + 1
            state, metrics = executable(state, batch)
            return state, metrics | ({"loss": np.float32(np.nan)} if done == 4 else {})

        return step

    monkeypatch.setattr(loop, "compile_train_step", poisoned)
    with pytest.raises(DivergedError, match=r"step 4 diverged: loss=nan.*last good checkpoint is step 2"):
        run(config)
    assert [line["step"] for line in read_lines(tmp_path / "tiny")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["2"]


def test_capacity_warm_up_runs_as_scan_and_then_as_gather(tmp_path, monkeypatch):
    executions = []
    compile_train_step = loop.compile_train_step

    def spy(config: Config, *arguments: Any) -> Any:
        executions.append(config.perf.execution)
        return compile_train_step(config, *arguments)

    monkeypatch.setattr(loop, "compile_train_step", spy)
    routing = RoutingConfig(kind="expert", capacity_warmup_steps=2)
    folder = run(tiny_config(tmp_path, routing, steps=3))
    assert executions == ["scan", "gather"]
    shares = [line["tokens_per_depth"][2] for line in read_lines(folder)]
    assert shares[0] > 0.7 > max(shares[1:])  # k is 24, then 16, of 25 to 32 tokens


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        run(tiny_config(tmp_path / "file" / "runs"))


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: writing failed [OS error 28: No space left on device]")

    monkeypatch.setattr(loop.Checkpoints, "save", full)
    with pytest.raises(UserError, match=r"tiny cannot be written: No space left on device"):
        run(tiny_config(tmp_path))


def test_batches_of_the_tiny_dataset_depend_on_the_step_alone():
    config = tiny_config()
    np.testing.assert_array_equal(make_batch(config, 3)["tokens"], make_batch(config, 3)["tokens"])
    assert np.any(make_batch(config, 3)["tokens"] != make_batch(config, 4)["tokens"])

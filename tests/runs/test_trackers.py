"""Trackers: what each is told, resuming into its record, offline, failing, and the names of older releases."""

import dataclasses
import json
import math
import sys

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tiny_runs import dataset_maker, tiny_config  # pyright: ignore[reportMissingImports]

from mor_jax.cli.options import preset_with_overrides
from mor_jax.config import Config, TrainConfig
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.runs.metrics import read_metrics
from mor_jax.runs.trackers import TRACKERS, make_writers
from mor_jax.sweep.runs import with_overrides
from mor_jax.train.loop import train


class _Run:
    """A run of either package."""

    def __init__(self, broken=()):
        self.lines, self.finished, self.broken, self.metrics = [], 0, broken, []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values, step=None):
        if "log" in self.broken:
            raise ConnectionError("no route\nto the host")
        self.lines.append(values if step is None else {"step": step, **values})

    def finish(self):
        if "finish" in self.broken:
            raise TimeoutError("too long")
        self.finished += 1


class _Package:
    """wandb or trackio, as far as they are used."""

    def __init__(self, *, credentials=True, broken=()):
        self.credentials, self.broken = credentials, broken
        self.starts, self.runs, self.torn_down = [], [], 0

    def login(self, *, prompt):
        assert not prompt, "asking would hang a job"
        return self.credentials

    def init(self, **options):
        self.starts.append(options)
        if "init" in self.broken or options.get("mode", "") in self.broken:
            raise ConnectionError("the service does not answer")
        self.runs.append(_Run(self.broken))
        return self.runs[-1]

    def teardown(self):
        self.torn_down += 1


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def package(monkeypatch):
    """Put a stand-in for a package where it is imported from."""

    def put(name, **options):
        made = _Package(**options)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return put


def _write(folder, *trackers, start=0, steps=(1,), config=None):
    writers = make_writers(folder, restored_step=start, trackers=trackers, config=config)
    for step in steps:
        writers.write(step, {"loss": 2.5, "load_R": [0.25, 0.75]})
    writers.flush()
    writers.close()


def test_tensorboard_gets_scalars_and_the_entries_of_lists(tmp_path):
    _write(tmp_path, "tensorboard")
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, tags = path.read_bytes(), {}
    while data:  # a record is an 8-byte length, a 4-byte checksum, the event, a 4-byte checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        tags |= {value.tag: value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert tags == {"loss": 2.5, "load_R/0": 0.25, "load_R/1": 0.75}
    assert (tmp_path / "metrics.jsonl").exists()


def test_other_processes_write_nothing(tmp_path, package):
    made = package("wandb")
    writers = make_writers(tmp_path, restored_step=0, trackers=tuple(TRACKERS), primary=False)
    writers.write(1, {"loss": 1.0})
    writers.close()
    assert list(tmp_path.iterdir()) == [] and made.starts == []


def test_wandb_gets_the_configuration_and_every_value(tmp_path, package):
    made = package("wandb")
    _write(tmp_path, "wandb", config={"train": {"steps": 3}})
    (start,) = made.starts
    assert start["config"] == {"train": {"steps": 3}} and start["name"] == tmp_path.name
    assert (start["project"], start["mode"], start["dir"]) == ("mor_jax", "online", str(tmp_path))
    (run,) = made.runs
    assert run.lines == [{"step": 1, "loss": 2.5, "load_R/0": 0.25, "load_R/1": 0.75}] and run.finished == 1
    assert ("*", "step") in run.metrics  # steps that are trained again after a resume are drawn where they belong


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_resumes_into_its_record(tmp_path, package, name):
    made = package(name)
    _write(tmp_path, name, steps=(1, 2, 3))
    _write(tmp_path, name, start=2, steps=(3, 4))
    other = tmp_path / "other"
    other.mkdir()
    _write(other, name)
    key = "id" if name == "wandb" else "name"
    records = [start[key] for start in made.starts]
    assert records[0] == records[1] != records[2] and all(start["resume"] == "allow" for start in made.starts)
    assert [line["step"] for run in made.runs[:2] for line in run.lines] == [1, 2, 3, 3, 4]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_is_offline_without_credentials(tmp_path, package, caplog):
    made = package("wandb", credentials=False)
    caplog.set_level("INFO", "mor_jax")
    _write(tmp_path, "wandb")
    assert [start["mode"] for start in made.starts] == ["offline"] and made.runs[0].lines
    assert "no credentials" in caplog.text


def test_wandb_is_offline_without_a_network(tmp_path, package, caplog):
    made = package("wandb", broken=("online",))
    _write(tmp_path, "wandb")
    assert [start["mode"] for start in made.starts] == ["online", "offline"] and made.torn_down == 1
    assert made.starts[0]["id"] == made.starts[1]["id"] and made.starts[0]["settings"]["init_timeout"] <= 30
    assert made.runs[0].lines and "written offline (the service does not answer)" in caplog.text


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_what_the_environment_says_of_wandb_holds(tmp_path, package, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    made = package("wandb", credentials=False)
    _write(tmp_path, "wandb")
    (start,) = made.starts
    assert "mode" not in start and start["project"] == "mine"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("init", "cannot start; training goes on without it (ConnectionError: the service does not answer)"),
        ("log", "failed at step 1; training goes on without it (ConnectionError: no route)"),
        ("finish", "failed at its end; training goes on without it (TimeoutError: too long)"),
    ],
)
def test_a_tracker_that_fails_is_logged_once_and_stops_nothing(tmp_path, package, caplog, name, broken, words):
    package(name, broken=(broken,))
    _write(tmp_path, name, "tensorboard", steps=(1, 2, 3))
    warnings = [message for message in caplog.messages if message.startswith("train.trackers")]
    assert warnings == [f"train.trackers: {name} {words}"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setitem(sys.modules, name, None)
    _write(tmp_path, name)
    assert f"{name} cannot start; training goes on without it (pip install -e '.[track]')" in caplog.text


def test_a_run_of_all_of_them_resumes_also_from_an_old_configuration(tmp_path, package):
    wandb, trackio = package("wandb"), package("trackio", broken=("log",))
    config = tiny_config(tmp_path, steps=2, trackers=("tensorboard", "wandb", "trackio"))
    folder = train(config, make_dataset=dataset_maker(config), devices=jax.devices()[:1])
    values = json.loads((folder / "config.json").read_text())
    del values["train"]["trackers"]
    (folder / "config.json").write_text(json.dumps(values | {"train": values["train"] | {"tensorboard": True}}))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3, trackers=("wandb",)))
    train(longer, make_dataset=dataset_maker(longer), devices=jax.devices()[:1])
    assert [line["step"] for run in wandb.runs for line in run.lines] == [1, 2, 3]
    assert wandb.starts[0]["id"] == wandb.starts[1]["id"] and len(trackio.starts) == 1
    assert wandb.starts[1]["config"]["train"]["steps"] == 3
    assert all(math.isfinite(line["loss"]) for run in wandb.runs for line in run.lines)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]


def test_trackers_that_are_not_known_or_named_twice_are_refused():
    with pytest.raises(UserError, match=r"train.trackers='mlflow' is not one of 'tensorboard', 'wandb', 'trackio'"):
        TrainConfig(trackers=("mlflow",))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="names one twice"):
        TrainConfig(trackers=("wandb", "wandb"))


@pytest.mark.parametrize(("old", "new"), [(True, ("tensorboard",)), (False, ())])
def test_the_flag_of_older_configurations_is_translated(tmp_path, old, new):
    values = config_io.to_dict(Config())
    del values["train"]["trackers"]
    values["train"]["tensorboard"] = old
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_io.load(Config, tmp_path / "config.json").train.trackers == new
    assert with_overrides(Config(), {"train.tensorboard": old}).train.trackers == new
    both = with_overrides(Config(), {"train.trackers": ["wandb"], "train.tensorboard": old})
    assert both.train.trackers == (*new, "wandb")


@pytest.mark.parametrize("value", [3, "yes", None, [True]])
def test_a_flag_that_was_never_one_is_refused(value):
    values = config_io.to_dict(Config())
    values["train"]["tensorboard"] = value
    with pytest.raises(UserError, match=r"unknown field 'train.tensorboard'"):
        config_io.from_dict(Config, values)


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ((), ("tensorboard",)),
        (("--train.tensorboard",), ("tensorboard",)),
        (("--train.no-tensorboard", "--train.steps", "7"), ()),
        (("--train.no_tensorboard",), ()),
        (("--train.trackers",), ()),
        (("--train.trackers", "wandb", "trackio", "--train.steps", "7"), ("wandb", "trackio")),
    ],
)
def test_flags_of_older_scripts_hold(flags, trackers):
    assert preset_with_overrides(["debug", *flags], "train", "").train.trackers == trackers

"""Several processes on this host are one run: the same losses, one stop for all, and a resume on any number of them."""

import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from hosts import Hosts, batch_rows, free_port
from tiny_runs import read_lines, saved_fingerprints

from mor_jax.config import DistributedConfig
from mor_jax.errors import UserError
from mor_jax.mesh.processes import find_place
from mor_jax.mesh.rollcall import ProcessPlace, roll_call

DEVICES = 4
MESH = {"data": 2, "fsdp": 2}
STEPS = 12


def _start(folder: Path, count: int, **options) -> Hosts:
    train = {"steps": STEPS, "save_every": 6, "eval_every": 6, "pictures": True, **options.pop("train", {})}
    return Hosts(folder, count, DEVICES // count, mesh=MESH, train=train, **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    _start(folder, 1).finish()
    return folder


def _assert_same_losses(folder: Path, wanted: Path) -> None:
    lines, expected = read_lines(folder / "tiny"), read_lines(wanted / "tiny")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "grad_norm", *(name for name in line if name.endswith("_nll"))):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(alone, tmp_path, count):
    """Losses, validation, rows; metrics, checkpoints and pictures written once."""
    hosts = _start(tmp_path, count)
    run = hosts.finish()
    _assert_same_losses(tmp_path, alone)
    assert batch_rows(tmp_path) == batch_rows(alone)
    for index in range(count):
        rows = [line.split()[:2] for line in (tmp_path / f"batches-{index}.txt").read_text().splitlines()]
        assert len(rows) <= (STEPS + 1) * 8 // min(count, DEVICES), "a process reads only its rows"
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in (alone / "tiny").iterdir())
    assert f"{count} processes (" in hosts.output(0) and "run " not in hosts.output(count - 1).split("step 1/")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "number"),
    [(2, signal.SIGTERM), (4, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGUSR1), (2, signal.SIGHUP)],
)
def test_a_signal_to_one_stops_all_at_one_step_and_one_process_goes_on(alone, tmp_path, count, number):
    hosts = _start(tmp_path, count, pause=0.2, train={"save_every": 0})
    hosts.wait_for_lines(2)
    hosts.processes[count - 1].send_signal(number)
    run = hosts.finish()
    steps = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert len(steps) == 1 and 2 <= steps[0] < STEPS
    assert f"{number.name}: saved at step {steps[0]}" in hosts.output(0)
    _start(tmp_path, 1).finish()
    _assert_same_losses(tmp_path, alone)
    assert batch_rows(tmp_path) == batch_rows(alone), "bitwise the same rows, whoever read them"


@pytest.mark.slow
def test_what_one_process_cannot_read_all_take_for_damaged(alone, tmp_path):
    run = _start(tmp_path, 2, train={"steps": 6, "save_every": 3}).finish()
    hosts = _start(tmp_path, 2, unreadable=[1, 6])
    hosts.finish()
    assert "checkpoint 6 is damaged and skipped: process 1 says: state cannot be read here" in hosts.output(0)
    assert "checkpoint 6 is damaged and skipped: state cannot be read here" in hosts.output(1)
    assert "continued from step 3" in hosts.output(0)
    _assert_same_losses(tmp_path, alone)
    assert (run / "checkpoints-damaged" / "6").is_dir()


@pytest.mark.slow
def test_two_processes_continue_what_one_began(alone, tmp_path):
    _start(tmp_path, 1, train={"steps": 6}).finish()
    one = saved_fingerprints(tmp_path / "tiny", 6)
    hosts = _start(tmp_path, 2)
    hosts.finish()
    assert one == saved_fingerprints(alone / "tiny", 6)
    assert "continued from step 6" in hosts.output(0)
    _assert_same_losses(tmp_path, alone)


def test_a_process_that_stays_away_is_named(tmp_path):
    """Both that came say the same within the time, and exit with code 2."""
    hosts = Hosts(tmp_path, 3, 1, start=(0, 2), timeout=10)
    assert hosts.wait() == [2, 2]
    for index in (0, 2):
        lines = hosts.output(index).splitlines()
        assert "2 of 3 processes came within 10 s: 0 (" in lines[-1] and "missing: process 1 (" in lines[-1]
        assert len(lines) == 1, "one line, and no stack of JAX"


def _roll_call(place: ProcessPlace, seconds: float = 20.0) -> tuple[threading.Thread, list]:
    result: list = []

    def run() -> None:
        try:
            result.append(roll_call(place, seconds))
        except UserError as error:
            result.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def _connect(place: ProcessPlace) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(place.address, timeout=3)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("count", "others", "message"),
    [
        (3, [(3, 1), (3, 1)], "two processes came with the id 1: from "),
        (2, [(3, 1)], "was told of 3 processes, but process 0 of 2"),
    ],
)
def test_processes_that_do_not_fit_together_are_told(count, others, message):
    address = f"localhost:{free_port()}"
    started = [
        _roll_call(ProcessPlace(address, count, 0)),
        *(_roll_call(ProcessPlace(address, *other)) for other in others),
    ]
    for thread, _ in started:
        thread.join()
    assert all(message in result[0] for _, result in started), started


def test_a_coordinator_that_is_not_there_is_named():
    _, result = started = _roll_call(ProcessPlace(f"localhost:{free_port()}", 2, 1), 0.5)
    started[0].join()
    assert "missing: process 0 did not answer process 1" in result[0] and "Connection refused" in result[0]


def test_all_learn_the_names_whatever_knocks_between():
    address = f"localhost:{free_port()}"
    primary = _roll_call(ProcessPlace(address, 3, 0), 20)
    with _connect(ProcessPlace(address, 3, 0)) as scanner:
        scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
    others = [_roll_call(ProcessPlace(address, 3, index), 20) for index in (1, 2)]
    for thread, _ in (primary, *others):
        thread.join()
    assert [result for _, result in (primary, *others)] == [[[socket.gethostname()] * 3]] * 3


def test_the_place_comes_from_flags_then_environment_then_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert find_place(DistributedConfig()) is None
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place(DistributedConfig()) == ProcessPlace("node3:61447", 2, 1, (0,))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    assert find_place(DistributedConfig(process_id=3)) == ProcessPlace("here:1", 4, 3)
    assert find_place(DistributedConfig(enabled=False)) is None
    assert find_place(DistributedConfig(num_processes=1)) is None
    with pytest.raises(UserError, match=r"process_id=4 is outside 0..3"):
        find_place(DistributedConfig(process_id=4))


def test_half_an_answer_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"distributed.coordinator, distributed.process_id not given"):
        find_place(DistributedConfig(num_processes=2))
    with pytest.raises(UserError, match="coordinator='here' is not host:port"):
        find_place(DistributedConfig(coordinator="here", num_processes=2, process_id=0))

"""The scripts for pods: what the supervisor decides with a stand-in for `mor`, and the cloud commands of the others."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def _executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def _environment(folder: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **extra}


def _supervise(folder: Path, mor: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the supervisor on a `mor` that keeps count of its starts in a file."""
    count = f"n=$(($(cat {folder}/starts 2>/dev/null || echo 0) + 1)); echo $n > {folder}/starts\n"
    command = _executable(folder / "mor", count + mor)
    environment = _environment(folder, MOR=str(command), PAUSE="0", **extra)
    arguments = [TPU / "supervise.sh", "train", "debug"]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _starts(folder: Path) -> int:
    return int((folder / "starts").read_text())


@pytest.mark.parametrize(
    ("mor", "starts", "code", "says"),
    [
        ("((n < 3)) && kill -KILL $$; echo runs/debug", 3, 0, "finished"),
        ("((n < 3)) && exit 1; echo runs/debug", 3, 0, "finished"),  # a host that lost its peers ends with 1
        ("((n < 2)) && echo 'SIGTERM: saved at step 7; the same command continues'; exit 0", 2, 0, "finished"),
        ("echo 'mor train: step 9 diverged: loss=nan'; exit 1", 1, 1, "diverged"),
        ("echo 'mor train: unknown preset'; exit 2", 1, 2, "would not help"),
        ("exit 137", 4, 137, "giving up"),
    ],
    ids=["killed", "lost-peers", "preempted-elsewhere", "diverged", "user-error", "never-lasts"],
)
def test_when_the_supervisor_starts_again(tmp_path, mor, starts, code, says):
    done = _supervise(tmp_path, mor, RESTARTS="3")
    assert (_starts(tmp_path), done.returncode) == (starts, code), done.stdout
    assert says in done.stdout


def test_the_supervisor_hands_on_a_signal_and_waits_for_the_save(tmp_path):
    mor = _executable(
        tmp_path / "mor",
        f"trap 'kill $!; sleep 0.3; echo saved > {tmp_path}/saved; exit 0' TERM\necho up\nsleep 30 & wait $!",
    )
    environment = _environment(tmp_path, MOR=str(mor), PAUSE="0")
    with subprocess.Popen([TPU / "supervise.sh"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "up\n" for line in process.stdout)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 0, rest
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert "stopped on request" in rest


def test_the_supervisor_sets_the_flags_of_its_generation(tmp_path):
    done = _supervise(tmp_path, 'echo "[$LIBTPU_INIT_ARGS]"', GENERATION="v5e")
    assert "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true" in done.stdout
    assert "#" not in done.stdout
    assert _supervise(tmp_path, "true", GENERATION="v9").returncode == 2


def _cloud(folder: Path, script: str, *arguments: str, answer: str = "ACTIVE", **extra: str) -> tuple[int, list[str]]:
    """Run a script with a stand-in for gcloud that writes down what it is asked; the exit code and the calls."""
    _executable(folder / "gcloud", f'echo "$*" >> {folder}/calls\n[[ $* == *describe* ]] && echo {answer}; exit 0')
    settings = {"PROJECT": "p", "ZONE": "z", "NAME": "pod", "TYPE": "v5litepod-256", "BUCKET": "gs://b", **extra}
    command = ["bash", str(TPU / script), *arguments]
    done = subprocess.run(
        command, env=_environment(folder, **settings), capture_output=True, text=True, timeout=60, check=False
    )
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_create_waits_for_a_pod_that_exists(tmp_path):
    code, calls = _cloud(tmp_path, "create.sh")
    assert code == 0 and all("describe pod" in call for call in calls)


def test_create_asks_for_several_spot_slices(tmp_path):
    code, calls = _cloud(tmp_path, "create.sh", answer="", SLICES="2", SPOT="1", WAIT="-1")
    asked = next(call for call in calls if "queued-resources create" in call)
    assert code == 1  # still queued, told to ask again
    for part in ("--node-count=2", "--node-prefix=pod", "--spot", "--runtime-version=v2-alpha-tpuv5-lite"):
        assert part in asked


def test_create_gives_up_on_a_refused_request(tmp_path):
    assert _cloud(tmp_path, "create.sh", answer="FAILED")[0] == 1


def test_run_starts_every_host_of_every_slice(tmp_path):
    code, calls = _cloud(tmp_path, "run.sh", "start", "debug", "--train.name", "a b", SLICES="2")
    assert code == 0 and sorted(call.split()[4] for call in calls) == ["pod-0", "pod-1"]
    assert all("GENERATION=v5e" in c and r"--train.name a\ b --train.runs gs://b/runs" in c for c in calls)


def test_an_unknown_type_and_a_missing_setting_are_refused(tmp_path):
    assert _cloud(tmp_path, "delete.sh", TYPE="v9-8") == (2, [])
    assert _cloud(tmp_path, "delete.sh", ZONE="")[0] != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

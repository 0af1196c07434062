"""Small versions of ``experiments/kill``: a kill per phase, every file of a checkpoint damaged, one of eight killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "experiments" / "kill"


@pytest.mark.slow
def test_kills_and_damages_lose_nothing(tmp_path):
    out = tmp_path / "kill.json"
    command = [sys.executable, str(FOLDER / "kill_rounds.py"), "--rounds", "3", "--out", str(out)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {entry["phase"] for entry in result["rounds"]} == {"training", "saving", "restoring"}
    assert result["kills"] == 3 and result["kills_with_something_wrong"] == result["damages_silent"] == 0
    assert result["damages_detected"] > result["damages"] / 4


@pytest.mark.slow
def test_four_go_on_after_one_of_eight_was_killed(tmp_path):
    out = tmp_path / "kill_one.json"
    command = [sys.executable, str(FOLDER / "kill_one.py"), "--folder", str(tmp_path / "runs"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads(out.read_text())["rounds"]
    assert [entry["phase"] for entry in rounds] == ["training", "saving"] and all(entry["right"] for entry in rounds)
    assert rounds[0]["continued_from"] == 6

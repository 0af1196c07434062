"""A small version of ``experiments/kill``: one kill per phase, and every file of a checkpoint damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "experiments" / "kill" / "kill_rounds.py"


@pytest.mark.slow
def test_kills_and_damages_lose_nothing(tmp_path):
    out = tmp_path / "kill.json"
    command = [sys.executable, str(SCRIPT), "--rounds", "3", "--out", str(out)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {entry["phase"] for entry in result["rounds"]} == {"training", "saving", "restoring"}
    assert result["kills"] == 3 and result["kills_with_something_wrong"] == result["damages_silent"] == 0
    assert result["damages_detected"] > result["damages"] / 4

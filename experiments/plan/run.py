"""Compile every case that has no result yet, one at a time: `python experiments/plan/run.py [--only TEXT]`.

Each takes minutes of one or two cores, so run it under `nice`. Stop it whenever you like: finished cases stay.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from cases import Case, cases

RESULTS = Path(__file__).parent / "results"


def plan(case: Case) -> dict[str, object]:
    """Run `mor plan`; a step that does not fit is a result too."""
    command = [sys.executable, "-m", "mor_jax.cli", "plan", *case.arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode == 2 and "out of memory" in last[0]:
        return {"command": " ".join(["mor", "plan", *case.arguments]), "error": last[0]}
    raise RuntimeError(f"{case.name}: exit code {done.returncode}: {last[0]}")


def main() -> None:
    """Run the missing cases in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    only = parser.parse_args().only
    RESULTS.mkdir(exist_ok=True)
    for case in cases():
        target = RESULTS / f"{case.name}.json"
        if only not in case.name or target.exists():
            continue
        start = time.monotonic()
        result = plan(case)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
        print(f"{case.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

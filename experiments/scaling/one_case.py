"""Time one case: start its processes, wait for all of them, and put together what they measured."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts import Case

from mor_jax.bench.measure import Request
from mor_jax.config.io import to_dict

_POLL_SECONDS = 0.2
_WARMUP = 3
_CACHE = Path(tempfile.gettempdir()) / "mor_jax-scaling"
"""Compiled programs of one card, which every start of the driver times again, and of CPUs, where nothing is timed."""

_THREADS = 8
"""Per fake device, asked for by NPROC. XLA takes as many as there are cores or devices: where devices start independent
collectives in different orders, each thread then waits in one, and none is left for the one that would end it."""


@dataclass(frozen=True)
class _Process:
    folder: Path
    child: "subprocess.Popen[bytes]"

    def said(self) -> str:
        """What it printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")


def time_case(case: Case, *, steps: int, seconds: float, cpu: bool) -> dict[str, Any] | None:
    """Run a case.

    Args:
        case: what to time; several cards are profiled too.
        steps: steps timed.
        seconds: after which it is stopped.
        cpu: fake CPU devices stand in for the cards.

    Returns:
        What ``bench.measure`` found in process 0, with the communication of all devices; ``{"error"}``; or None if
        the time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        address, processes = f"localhost:{_free_port()}", list[_Process]()
        try:
            for index in range(case.processes):
                processes.append(_start(case, index, address, Path(folder) / str(index), steps=steps, cpu=cpu))
            state = _wait(processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.child.kill()
                process.child.wait()
        if state != "done":
            return None if state == "late" else {"error": state}
        return _together(processes)


def environment_of(case: Case, index: int, address: str, *, cpu: bool) -> dict[str, str]:
    """What a process of a case finds in its environment beside what this one does: its cards and its place."""
    each = case.cards // case.processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(case.cards)))).split(",")
    wanted = {"CUDA_VISIBLE_DEVICES": ",".join(visible[index * each : (index + 1) * each])}
    if cpu:
        flags = f"--xla_force_host_platform_device_count={each} --xla_backend_optimization_level=0"
        wanted = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        if each > 1:
            wanted["NPROC"] = str(_THREADS * each)
    if case.processes > 1:
        place = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(case.processes), "PROCESS_ID": str(index)}
        wanted |= {f"JAX_{name}": value for name, value in place.items()}
    if cpu or case.cards == 1:
        wanted["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
    return wanted


def _start(case: Case, index: int, address: str, folder: Path, *, steps: int, cpu: bool) -> _Process:
    folder.mkdir()
    profile = str(folder / "trace") if case.cards > 1 else ""
    common = {"steps": steps, "warmup": _WARMUP, "packed": False, "devices": case.cards, "profile": profile}
    request = Request(case.name, case.config(), **common)
    (folder / "request.json").write_text(json.dumps(to_dict(request)), encoding="utf-8")
    command = [sys.executable, "-m", "mor_jax.bench.measure", str(folder / "request.json"), str(folder / "result.json")]
    environment = os.environ | environment_of(case, index, address, cpu=cpu)
    with (folder / "output.txt").open("wb") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return _Process(folder, child)


def _wait(processes: Sequence[_Process], deadline: float) -> str:
    """Wait for all: `done`, `late`, or what the first that failed said last."""
    while True:
        codes = [process.child.poll() for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code:
                return last_words(process.said()) or f"exit code {code}"
        if all(code == 0 for code in codes):
            return "done"
        if time.monotonic() > deadline:
            return "late"
        time.sleep(_POLL_SECONDS)


def last_words(said: str) -> str:
    """The last lines that a process printed, without the frames of C++ with which XLA follows a fatal message."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("    @ ")]
    return "\n".join(line[:500] for line in lines[-6:])


def _together(processes: Sequence[_Process]) -> dict[str, Any]:
    results = [json.loads((process.folder / "result.json").read_text(encoding="utf-8")) for process in processes]
    first: dict[str, Any] = results[0]
    if "profile" in first:
        devices = [
            {"process": index, **device}
            for index, result in enumerate(results)
            for device in result["profile"]["communication"]
        ]
        first["profile"]["communication"] = devices
    log = [line for line in processes[0].said().splitlines() if "mor_jax" in line]
    return first | {"log": log}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]

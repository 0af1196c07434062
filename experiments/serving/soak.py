"""Does `mor serve` survive its clients? Thousands of random requests, many of them bad, against a real process.

Usage: python experiments/serving/soak.py RUN --out FILE (RUN: any small run, such as `mor train debug`; it gets a chat
template if it has none). Afterwards nothing may be held: no place, page, connection or thread; memory has to be flat;
nobody may have waited long; SIGTERM has to finish what runs.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from soak_client import Client, Limits, send_many

from mor_jax.data.special_tokens import RECORD
from mor_jax.versions import installed_versions

AT_ONCE, PLACES_BEYOND, REQUEST_BYTES = 32, 32, 32_768
RUNNING_AT_THE_END = 6
FLAT = 0.03
"""Share by which the process may be larger over the last quarter of the requests than over the second."""
LONGEST_WAIT = 30.0
"""Seconds that an answer's first byte may take: a tenth of what the server allows a whole request. Nobody overtakes, so
that who waits longer has been forgotten."""
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "
HELD = ("mor_running_sequences", "mor_waiting_sequences", "mor_pages_used", "mor_open_requests")


@dataclass
class ServerProcess:
    """``mor serve`` as a process of its own."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    """What it has written to stderr."""

    @classmethod
    def start(cls, run: Path, flags: list[str]) -> "ServerProcess":
        """Start it and wait until it serves."""
        options = ["--port", "0", "--max-queue", str(PLACES_BEYOND), "--max-request-bytes", str(REQUEST_BYTES)]
        command = [sys.executable, "-m", "mor_jax.cli", "serve", str(run), *options, "--steps", "4", *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on http://.*:(\d+)", line):
                server = cls(process, int(found[1]), lines)
                threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
                return server
        raise SystemExit("".join(lines))

    def resources(self) -> dict[str, float]:
        """Memory, file descriptors and threads of the process (Linux)."""
        folder = Path(f"/proc/{self.process.pid}")
        pages = int((folder / "statm").read_text().split()[1])
        return {
            "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "file_descriptors": len(list((folder / "fd").iterdir())),
            "threads": len(list((folder / "task").iterdir())),
        }

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics``, summed over labels but for those of how a completion ended."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                key = name if "finish=" in name else name.partition("{")[0]
                found[key] = found.get(key, 0) + float(value)
        return found

    def settled(self, seconds: float = 60.0) -> dict[str, float]:
        """Metrics when nothing is held any more, or after a while."""
        limit = time.monotonic() + seconds
        while any((metrics := self.metrics())[name] for name in HELD) and time.monotonic() < limit:
            time.sleep(0.2)
        time.sleep(1)  # connections that were just closed
        return metrics


async def soak(server: ServerProcess, client: Client, requests: int) -> list[dict[str, float]]:
    """Send requests, and sample the server's resources after every 2% of them."""
    samples = []
    step = max(1, requests // 50)
    for begin in range(0, requests, step):
        await send_many(client, min(step, requests - begin), AT_ONCE)
        pages = await asyncio.to_thread(server.metrics)
        told = {name: pages[f"mor_{name}"] for name in ("pages_used", "pages_kept")}
        samples.append({"requests": sum(client.outcomes.values()), **server.resources(), **told})
        print(samples[-1], file=sys.stderr)
    return samples


async def end(server: ServerProcess, client: Client) -> dict[str, Any]:
    """SIGTERM while completions run: they finish, and the process ends with code 0."""
    before = len(client.violations)
    running = [asyncio.create_task(client.stream()) for _ in range(RUNNING_AT_THE_END)]
    accepted = 0
    while accepted < RUNNING_AT_THE_END:
        answered = sum(task.done() for task in running)
        accepted = answered + (await asyncio.to_thread(server.metrics))["mor_open_requests"]
    server.process.send_signal(signal.SIGTERM)
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    code = await asyncio.to_thread(server.process.wait, 60)
    return {"exit_code": code, "outcomes": [str(o) for o in outcomes], "violations": client.violations[before:]}


def judge(record: dict[str, Any]) -> list[str]:
    """Say what is wrong with a record."""
    wrong = list(record["violations"])
    wrong += [f"{name}={value} at the end" for name, value in record["held_at_the_end"].items() if value]
    if record["accepted_completions"] != record["ended_completions"]:
        wrong.append(f"{record['accepted_completions']} completions accepted, {record['ended_completions']} ended")
    if record["compilations_under_load"]:
        wrong.append(f"{record['compilations_under_load']} compilations under load")
    if record["rss_growth"] > FLAT:
        wrong.append(f"memory grew by {record['rss_growth']:.1%}")
    if record["waits"]["longest"] > LONGEST_WAIT:
        wrong.append(f"an answer began after {record['waits']['longest']:.1f} s")
    first, last = record["before"], record["after"]
    wrong += [
        f"{name}: {first[name]} before, {last[name]} after"
        for name in first
        if last[name] > first[name] and name != "rss_mib"
    ]
    if record["sigterm"]["exit_code"] != 0 or set(record["sigterm"]["outcomes"]) - {"answered", "refused 429"}:
        wrong.append(f"SIGTERM: {record['sigterm']}")
    return wrong


def with_template(run: Path, folder: Path) -> Path:
    """Return a run with a chat template: itself, or one in ``folder`` that has all its files."""
    tokens = json.loads((run / RECORD).read_text(encoding="utf-8"))
    if any("template" in name for name in (*tokens["files"], *tokens["files"].get("tokenizer_config.json", ()))):
        return run
    for path in run.iterdir():
        if path.name != RECORD:
            (folder / path.name).symlink_to(path.resolve())
    tokens["files"]["chat_template.jinja"] = TEMPLATE
    (folder / RECORD).write_text(json.dumps(tokens), encoding="utf-8")
    return folder


def measure(run: Path, requests: int, seed: int, flags: list[str]) -> dict[str, Any]:
    """Start a server, soak it, end it."""
    server = ServerProcess.start(run, flags)
    try:
        length = json.load(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models"))["data"][0]["max_length"]
        client = Client(Limits(server.port, length, REQUEST_BYTES), random.Random(seed))
        asyncio.run(send_many(client, 4 * AT_ONCE, AT_ONCE))  # threads that come with the first requests
        before, first = server.settled(), server.resources()
        client.waits.clear()
        begin = time.monotonic()
        samples = asyncio.run(soak(server, client, requests))
        seconds = time.monotonic() - begin
        metrics, last = server.settled(), server.resources()
        sigterm = asyncio.run(end(server, client))
    finally:
        server.process.kill()
        server.process.wait()
    quarter = len(samples) // 4
    sizes = [
        statistics.mean(s["rss_mib"] for s in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    ]
    ended = {name: value for name, value in metrics.items() if name.startswith("mor_completions_total{")}
    return {
        "requests": requests,
        "seed": seed,
        "seconds": seconds,
        "outcomes": dict(sorted(client.outcomes.items())),
        "violations": client.violations,
        "held_at_the_end": {name: metrics[name] for name in HELD},
        "accepted_completions": metrics["mor_accepted_completions_total"],
        "ended_completions": sum(ended.values()),
        "completions": ended,
        "generated_tokens": metrics["mor_generated_tokens_total"],
        "waits": {
            "answers": len(client.waits),
            "median": statistics.median(client.waits),
            "p99": statistics.quantiles(client.waits, n=100)[-1],
            "longest": max(client.waits),
        },
        **{name: metrics[f"mor_{name}"] for name in ("pages", "preemptions_total", "prefix_hits_total")},
        "cached_prompt_tokens": metrics["mor_cached_prompt_tokens_total"],
        "prompt_tokens": metrics["mor_prompt_tokens_total"],
        "compilations_under_load": metrics["mor_compilations_total"] - before["mor_compilations_total"],
        "rss_growth": sizes[1] / sizes[0] - 1,
        "before": first,
        "after": last,
        "sigterm": sigterm,
        "samples": samples,
        "server_log": server.lines[-20:],
    }


def main() -> int:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="flags of mor serve; the last option")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = with_template(arguments.run, Path(folder))
        found = measure(run, arguments.requests, arguments.seed, arguments.serve)
    record = {
        "command": sys.argv,
        "versions": {**installed_versions(("mor-jax", "jax")), "python": sys.version.split()[0]},
        "device": jax.local_devices()[0].device_kind,
        **found,
    }
    record["wrong"] = judge(record)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k not in ("samples", "server_log")}, indent=1))
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

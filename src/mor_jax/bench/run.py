"""Run benchmark cases, each in a process of its own, and compare them within the one run."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mor_jax.bench.cases import Case
from mor_jax.config import Config
from mor_jax.config.io import to_dict
from mor_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the cases of one run are measured."""

    rows: int = 16
    """Rows per device and step."""
    steps: int = 20
    """Steps timed."""
    warmup: int = 3
    """Steps before."""
    packed: bool = False
    """Pack documents of 512 tokens on average into the rows, which attend to themselves alone. FLOPs, and so MFU, are
    still counted for attention over whole rows."""
    devices: int = 0
    """Devices used; 0 takes all."""
    timeout: float = 600.0
    """Seconds after which a case is given up."""
    profile: Path | None = None
    """Folder for traces; None takes none."""
    cache: Path | None = None
    """Folder of compiled programs shared by the cases; compile times then mean little."""

    def __post_init__(self) -> None:
        for name in ("rows", "steps", "timeout"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "devices"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


def run_cases(
    cases: Sequence[Case], settings: Settings, *, command: Sequence[str], done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure every case and relate it to the first.

    Args:
        cases: the first is the baseline.
        settings: of all of them.
        command: what the user ran, for the record.
        done: called with the whole record after every case, so that nothing is lost.

    Returns:
        `command`, `settings`, `cases` (results, or `error`), `ratios` of every case to the first.
    """
    record: dict[str, Any] = {
        "command": " ".join(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "cases": [],
        "ratios": [],
    }
    for case in cases:
        result = run_case(case, settings)
        record["cases"].append(result)
        record["ratios"] = ratios(record["cases"])
        done(record)
    return record


def measured_config(config: Config, settings: Settings) -> Config:
    """The configuration with one device's rows as its batch; packed documents do not see each other."""
    train = dataclasses.replace(config.train, accumulation=1, batch_size=settings.rows)
    attend_across = config.model.attend_across_documents and not settings.packed
    model = dataclasses.replace(config.model, attend_across_documents=attend_across)
    return dataclasses.replace(config, model=model, train=train)


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Measure one case in a fresh process; a failure becomes `{"name", "error"}`."""
    config = measured_config(case.config, settings)
    profile = "" if settings.profile is None else str(settings.profile / _file_name(case.name))
    request = {
        "name": case.name,
        "config": to_dict(config),
        "steps": settings.steps,
        "warmup": settings.warmup,
        "packed": settings.packed,
        "devices": settings.devices,
        "profile": profile,
    }
    environment = dict(os.environ)
    if settings.cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(settings.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "request.json", Path(folder) / "result.json"
        source.write_text(json.dumps(request), encoding="utf-8")
        arguments = [sys.executable, "-m", "mor_jax.bench.measure", str(source), str(target)]
        try:
            process = subprocess.run(
                arguments, capture_output=True, text=True, timeout=settings.timeout, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return {"name": case.name, "error": f"not finished after {settings.timeout:g} seconds"}
        if process.returncode or not target.exists():
            return {"name": case.name, "error": _last_lines(process.stderr) or f"exit code {process.returncode}"}
        result = json.loads(target.read_text(encoding="utf-8"))
        return result | {"log": [line for line in process.stderr.splitlines() if "mor_jax" in line]}


def _last_lines(text: str, count: int = 6) -> str:
    return "\n".join(line[:500] for line in text.strip().splitlines()[-count:])


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Relate every finished case to the first one: speed, step time, exact FLOPs, and memory."""
    finished = [r for r in results if "error" not in r]
    if not finished:
        return []
    base = finished[0]
    rows = []
    for result in finished[1:]:
        time_ratio = result["step_seconds"] / base["step_seconds"]
        flops_ratio = result["train_flops"] / base["train_flops"]
        rows.append(
            {
                "name": result["name"],
                "over": base["name"],
                "tokens_per_second": result["tokens_per_second"] / base["tokens_per_second"],
                "step_seconds": time_ratio,
                "train_flops": flops_ratio,
                "step_seconds_over_train_flops": time_ratio / flops_ratio,
                "peak_bytes": _ratio(result["peak_bytes"], base["peak_bytes"]),
                "program_bytes": _ratio(*((r["program_bytes"] or {}).get("total") for r in (result, base))),
            }
        )
    return rows


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def table(record: dict[str, Any]) -> str:
    """The run as text, one line per case."""
    header = ("case", "k", "ms", "+-", "tokens/s", "MFU", "GiB", "plan GiB", "compile s", "time x", "FLOPs x", "t/F")
    rows: list[tuple[str, ...]] = [header]
    later = iter([{}, *record["ratios"]])  # of the finished cases, in order; the first is what others are related to
    for result in record["cases"]:
        if "error" in result:
            rows.append((result["name"], "failed: " + result["error"].splitlines()[-1][:160], *[""] * 10))
            continue
        ratio = next(later)
        plan = (result["program_bytes"] or {}).get("total")
        rows.append(
            (
                result["name"],
                "/".join(map(str, result["tokens_per_recursion"])),
                f"{result['step_seconds'] * 1e3:.1f}",
                f"{result['step_seconds_spread']:.1%}",
                f"{result['tokens_per_second']:,.0f}",
                "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
                _gib(result["peak_bytes"]),
                _gib(plan),
                f"{result['compile_seconds']:.0f}",
                *(f"{ratio[k]:.3f}" if ratio else "" for k in _RATIO_COLUMNS),
            )
        )
    widths = [max(len(row[i]) for row in rows if len(row) > i and not row[1].startswith("failed")) for i in range(12)]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


_RATIO_COLUMNS = ("step_seconds", "train_flops", "step_seconds_over_train_flops")


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def profile_table(record: dict[str, Any]) -> str:
    """Milliseconds per step by kind of work, one column per case."""
    profiled = [r for r in record["cases"] if "profile" in r]
    if not profiled:
        return ""
    kinds = list(profiled[0]["profile"]["seconds_by_kind"])
    lines = ["milliseconds per step by kind (share of kernel time)"]
    for kind in kinds:
        cells = (
            f"{r['profile']['seconds_by_kind'][kind] * 1e3:8.2f} ({r['profile']['share_by_kind'][kind]:5.1%})"
            for r in profiled
        )
        lines.append(f"{kind:14s} " + "  ".join(cells))
    lines.append(f"{'all kernels':14s} " + "  ".join(f"{r['profile']['kernel_seconds'] * 1e3:8.2f}" for r in profiled))
    return "\n".join(lines)


def clock_table(name: str, beside: dict[str, Any]) -> str:
    """Milliseconds per step of a TPU, measured, predicted, and their ratio.

    Args:
        name: of the case.
        beside: from ``beside_clock``.
    """

    def line(label: str, pair: dict[str, Any]) -> str:
        measured, predicted = pair["measured_seconds"], pair["predicted_seconds"]
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        return f"{label:30s} {measured * 1e3:10.3f} {predicted * 1e3:10.3f} {ratio:>8s}"

    lines = [f"{name}: milliseconds per step measured, by the compiler's clock, and their ratio"]
    lines += [line(kind, pair) for kind, pair in beside["kinds"].items()]
    lines += [line("together, of what has a clock", beside["together"]), "where they differ most"]
    return "\n".join(lines + [f"{line(o['kind'], o)}  {o['name']}  {o['source'][-60:]}" for o in beside["operations"]])

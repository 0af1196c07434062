"""What a finished run of a sweep is reported as, and the table of all of them.

The headline loss is the causal one: `threshold` for a model with a router, the plain loss without one.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax.config import Config, ModelConfig
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.model.flops import (
    count_parameters,
    forward_flops,
    kv_bytes_per_token,
    paper_flops_per_token,
    run_flops,
)
from mor_jax.sweep.runs import SweepRun
from mor_jax.versions import installed_versions

RESULT = "result.json"
_PACKAGES = ("mor-jax", "jax", "jaxlib", "flax", "optax")
_ROUTER = (
    ("gap", "validation_gap"),
    ("threshold_accuracy", "validation_threshold_accuracy"),
    ("running_boundaries", "boundaries_R"),
    ("topk_nll", "validation_topk_nll"),
    ("topk_bits_per_byte", "validation_topk_bits_per_byte"),
    ("dead_token_ratio", "validation_topk_dead_token_ratio"),
    ("dropped", "validation_topk_dropped"),
    ("max_vio", "max_vio"),
    ("entropy", "entropy"),
)


def finished_result(run: SweepRun, metrics: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Report a finished run.

    Args:
        run: what was run.
        metrics: lines of its metrics.jsonl; the last one holds the final validation.
        seconds: wall-clock time of its (last) start, with compilation and evaluation.

    Returns:
        JSON values: costs, losses, router figures, machine and configuration. ``nll`` and ``bits_per_byte`` are the
        causal ones, None for a recipe that trains no causal boundary. ``curve`` has (step, training loss of that
        step's batch) at every logged step.
    """
    last = metrics[-1]
    model, train = run.config.model, run.config.train
    mode = "" if model.routing.kind == "none" else "threshold_"
    result = _described(run, "done") | {
        "nll": last.get(f"validation_{mode}nll"),
        "bits_per_byte": last.get(f"validation_{mode}bits_per_byte"),
        "train_loss": last["loss"],
        "curve": [[line["step"], round(line["loss"], 4)] for line in metrics],
        "seconds": round(seconds, 2),
        "tokens_per_second": last.get("tokens_per_second"),
    }
    result |= {name: last[key] for name, key in _ROUTER if key in last}
    shares = last.get(f"validation_{mode}tokens_per_depth")
    if shares is not None:
        result["tokens_per_depth"] = shares
    reaching = reaching_shares(model, shares)
    result["serving_flops_per_token"] = serving_flops_per_token(model, reaching)
    result["kv_bytes_per_token"] = kv_bytes_per_token(model, reaching)
    tokens = train.steps * train.batch_size * model.context_length
    return result | {"tokens": tokens, "train_flops": run_flops(run.config), "machine": machine()}


def failed_result(run: SweepRun, state: str, why: str) -> dict[str, Any]:
    """Report a run without a figure: `diverged`, `unfinished` or `not run`."""
    return _described(run, state) | {"why": why}


def _described(run: SweepRun, state: str) -> dict[str, Any]:
    count = count_parameters(run.config.model)
    return {
        "name": run.name,
        "group": run.group or run.name,
        "seed": run.config.train.seed,
        "state": state,
        "parameters": count.total,
        "non_embedding": count.non_embedding,
        "steps": run.config.train.steps,
        "paper_flops_per_token": paper_flops_per_token(run.config.model),
        "start": None if run.start is None else dataclasses.asdict(run.start),
        "config": _portable(run.config),
    }


def _portable(config: Config) -> dict[str, Any]:
    """The configuration with the folder of the runs by its name alone: where it lay says only whose machine it was."""
    train = dataclasses.replace(config.train, runs=Path(config.train.runs).name)
    return config_io.to_dict(dataclasses.replace(config, train=train))


def reaching_shares(model: ModelConfig, tokens_per_depth: Sequence[float] | None) -> tuple[float, ...]:
    """Share of the tokens that reach each recursion, [R], from shares at depth 0, ..., R; None takes the capacities."""
    if tokens_per_depth is None:
        return model.capacities
    beyond = np.cumsum(np.asarray(tokens_per_depth)[::-1])[::-1][1:]
    return tuple(float(share) for share in np.clip(beyond, 0.0, 1.0))


def serving_flops_per_token(model: ModelConfig, reaching: Sequence[float]) -> float:
    """Forward FLOPs per token of a full row, head included, when these shares of the tokens reach each recursion."""
    if model.routing.kind == "none":
        return sum(forward_flops(model).values()) / model.context_length
    least = 1.0 / model.context_length
    shares = [max(share, least) for share in reaching]
    first = 1.0 if model.routing.kind == "token" else shares[0]
    routing = dataclasses.replace(model.routing, capacities=(first, *shares[1:]), capacity_multiple=1)
    return sum(forward_flops(dataclasses.replace(model, routing=routing)).values()) / model.context_length


def machine() -> dict[str, Any]:
    """Say where and with what this process runs."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind if devices[0].platform != "cpu" else f"cpu ({platform.machine()})",
        "devices": len(devices),
        "python": platform.python_version(),
        "versions": installed_versions(_PACKAGES),
        "command": " ".join(["mor", *sys.argv[1:]]),
    }


def read_result(run_folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None.

    Raises:
        UserError: the file is damaged.
    """
    path = run_folder / RESULT
    if not path.exists():
        return None
    try:
        return config_io.read_json(path, "result")
    except UserError as error:
        raise UserError(f"{error}; delete it to run again") from error


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may report
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)

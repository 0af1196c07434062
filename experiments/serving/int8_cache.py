"""What do keys and values in int8 save, and what do they change? Runs beside themselves in bfloat16, on a CPU too.

Usage: python experiments/serving/int8_cache.py RUN [RUN ...] --out FILE. Each run is read with float32 numbers all
through, in bfloat16, and in bfloat16 with keys and values in int8. Held-out rows are read through the pages (as one
text each): loss, depths, most likely tokens. The engine then continues some of them greedily, and last serves a queue
in pools of equal bytes: how many sequences are in flight.

Differences between bfloat16 and float32 stand beside those between int8 and bfloat16: what rounding does anyway.
"""

import dataclasses
import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mor_jax.config import ModelConfig
from mor_jax.errors import require
from mor_jax.evaluate.inspect import held_out
from mor_jax.infer.cache import CacheShape, entry_bytes, init_cache, kv_layout
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions, KvDtype
from mor_jax.infer.prefill import prefill
from mor_jax.infer.request import Request
from mor_jax.interop.sources import open_run

KINDS: dict[str, tuple[str, KvDtype]] = {
    "float32": ("float32", "model"),
    "bfloat16": ("bfloat16", "model"),
    "int8": ("bfloat16", "int8"),
}
"""The model's dtype, and its keys' and values'."""


@dataclass(frozen=True)
class Settings:
    """What is asked."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of ``mor train``."""
    out: Path
    """JSON file for the results."""
    rows: int = 64
    """Held-out rows."""
    at_once: int = 8
    """Of them."""
    prompt: int = 64
    """Tokens of each row that the engine continues."""
    completion: int = 64
    """Tokens generated after each."""
    sequences: int = 12
    """What the pools have room for in bfloat16, at their longest and deepest."""
    queue: int = 128
    """Requests for these pools."""
    page_size: int = 16
    """Entries of a page."""


def read(model: DecodeModel, kv_dtype: KvDtype, rows_BT: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Read rows through the pages: losses [B, T - 1], depths and most likely tokens [B, T]."""
    count, length = settings.at_once, rows_BT.shape[1]
    shape = CacheShape(count, length, settings.page_size, kv_dtype=kv_dtype)
    zero_B, whole_B = jnp.zeros(count, jnp.int32), jnp.full(count, length, jnp.int32)

    def read_some(tokens_BT: np.ndarray) -> tuple[np.ndarray, ...]:
        cache = init_cache(model.config, shape)
        rows = (jnp.arange(count), jnp.asarray(tokens_BT), zero_B, whole_B, whole_B)
        _, output = prefill(model, cache, *rows, piece=length, return_logits=True)
        says_BTV = jax.nn.log_softmax(output.logits_BTV)
        loss_BT = -jnp.take_along_axis(says_BTV[:, :-1], tokens_BT[:, 1:, None], axis=2)[..., 0]
        return jax.device_get((loss_BT, output.depth_BT, jnp.argmax(says_BTV, axis=2)))

    parts = [read_some(rows_BT[first : first + count]) for first in range(0, len(rows_BT), count)]
    loss, depth, token = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {"loss": loss, "depth": depth, "token": token}


def options(settings: Settings, kv_dtype: KvDtype, **more: Any) -> EngineOptions:
    """Sizes of an engine that neither shares prefixes nor cuts the vocabulary."""
    length = settings.prompt + settings.completion
    sizes = {"max_length": length, "page_size": settings.page_size, "kv_dtype": kv_dtype}
    return EngineOptions(**sizes, kept=0, cuts=False, **more)


def requests(rows_BT: np.ndarray, settings: Settings) -> list[Request]:
    """The rows' first tokens, to be continued."""
    return [Request(tuple(row[: settings.prompt].tolist()), settings.completion) for row in rows_BT]


def continued(model: DecodeModel, kv_dtype: KvDtype, rows_BT: np.ndarray, settings: Settings) -> list[list[int]]:
    """Continue rows greedily."""
    engine = Engine(model, options(settings, kv_dtype, max_running=len(rows_BT)))
    found: dict[int, list[int]] = {engine.submit(request): [] for request in requests(rows_BT, settings)}
    for token in engine.run():
        found[token.request].append(token.token)
    return list(found.values())


def page_bytes(config: ModelConfig, kv_dtype: KvDtype, settings: Settings) -> list[int]:
    """Bytes of a page of each pool."""
    layout, entry = kv_layout(config), entry_bytes(config, kv_dtype) * settings.page_size
    return [entry * layers for layers in (layout.block_layers, layout.edge_layers) if layers]


def in_flight(model: DecodeModel, kv_dtype: KvDtype, rows_BT: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Serve a queue in pools of the bytes that some sequences at most take in bfloat16."""
    config, length = model.config, settings.prompt + settings.completion
    most = settings.sequences * -(-length // settings.page_size)
    wanted = [most * kv_layout(config).groups, most]
    budget = [pages * size for pages, size in zip(wanted, page_bytes(config, "model", settings), strict=False)]
    sizes = page_bytes(config, kv_dtype, settings)
    pages = [total // size for total, size in zip(budget, sizes, strict=True)] + [None]
    places = {"max_running": 4 * settings.sequences, "staged": 0}
    engine = Engine(model, options(settings, kv_dtype, **places, block_pages=pages[0], edge_pages=pages[1]))
    engine.warm_up()
    for request in requests(np.resize(rows_BT, (settings.queue, rows_BT.shape[1])), settings):
        engine.submit(request)
    begin, running = time.perf_counter(), []
    while engine.busy:
        engine.step()
        if engine.waiting:
            running.append(engine.running)
    engine.drain()
    later = running[len(running) // 4 :]  # the first places are given out while nothing is known of lengths
    return {
        "bytes": budget,
        "pages": pages[: len(sizes)],
        "pools_bytes": engine.measure().reserved,
        "in_flight_mean": float(np.mean(later)),
        "in_flight_largest": max(running),
        "preemptions": engine.statistics.preemptions,
        "seconds": time.perf_counter() - begin,
    }


def agreement(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> dict[str, float]:
    """How often depths and most likely tokens are the same."""
    return {name: float(np.mean(new[name] == old[name])) for name in ("depth", "token")}


def same_beginning(new: list[list[int]], old: list[list[int]]) -> dict[str, float]:
    """Completions that are the same, and tokens until the first that is not."""
    same = [next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
            for pair in zip(new, old, strict=True)]  # fmt: skip
    whole = np.mean([n == len(one) for n, one in zip(same, old, strict=True)])
    return {"same_completions": float(whole), "tokens_until_different": float(np.mean(same))}


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """Measure one run."""
    run = open_run(folder)
    dataset, rows = held_out(run.config), []
    same = dataset.tokenizer.hash == run.tokenizer.hash
    require(same, f"{folder}: its data were prepared again, with another tokenizer (by another Python)")
    while len(rows) < settings.rows:
        rows += list(dataset.batch(len(rows) // settings.at_once)["tokens"][:, :-1])
    dataset.close()
    rows_BT = np.stack(rows[: settings.rows]).astype(np.int32)
    state = {"router_bias_R": run.router_bias_R, "running_R": run.boundaries_R}
    prepare = functools.partial(prepare_weights, params=run.params, **state)
    models = {d: prepare(dataclasses.replace(run.config.model, dtype=d)) for d in ("float32", "bfloat16")}
    found = {name: read(models[dtype], kv, rows_BT, settings) for name, (dtype, kv) in KINDS.items()}
    texts = {name: continued(models[dtype], kv, rows_BT, settings) for name, (dtype, kv) in KINDS.items()}
    flights = {name: in_flight(models[d], kv, rows_BT, settings) for name, (d, kv) in KINDS.items() if d != "float32"}
    per_token = {kv: entry_bytes(models["bfloat16"].config, kv) for kv in ("model", "int8")}
    pairs = {"int8 and bfloat16": ("int8", "bfloat16"), "bfloat16 and float32": ("bfloat16", "float32")}
    model = run.config.model
    return {
        "run": folder.name,
        "step": run.step,
        "model": f"{model.routing.kind}, {model.recursion.sharing}, {model.num_layers} layers, {model.num_kv_heads} "
        f"key/value heads of {model.head_dim}",
        "tokens": int(found["int8"]["loss"].size),
        "entry_bytes": per_token,
        "loss": {name: float(one["loss"].mean()) for name, one in found.items()},
        "mean_depth": {name: float(one["depth"].mean()) for name, one in found.items()},
        "agreement": {name: agreement(found[a], found[b]) for name, (a, b) in pairs.items()},
        "greedy": {name: same_beginning(texts[a], texts[b]) for name, (a, b) in pairs.items()},
        "in_flight": flights,
        "in_flight_ratio": flights["int8"]["in_flight_mean"] / flights["bfloat16"]["in_flight_mean"],
    }


def main(settings: Settings) -> None:
    """Measure, and write the file."""
    result = {
        "settings": {**asdict(settings), "runs": [run.name for run in settings.runs], "out": settings.out.name},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "models": [],
    }
    for folder in settings.runs:
        result["models"].append(measure(folder, settings))
        print(json.dumps(result["models"][-1], indent=1), flush=True)
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))

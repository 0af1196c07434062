"""Throughput of the engine: the paper's setting (section 3.4, figure 4a), and one with prompts.

A queue of requests, output lengths from a normal distribution, key/value updates included, and random weights: speed
does not depend on them, but routing does, so routers are calibrated to the training capacities on random tokens, and
tokens are drawn uniformly (a random model left alone repeats one token, and with it one depth). All models run in
the same engine, in one process.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.bench.serving_profile import profile_dispatch
from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.bench.serving_setup import (
    Scenario,
    bytes_per_position,
    make_requests,
    options_for,
    parameter_bytes,
    parse_model,
    random_model,
)
from mor_jax.infer.cache import entry_bytes, kv_layout
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.replicas import AnyEngine, copy_meshes, make_engine
from mor_jax.infer.request import Request, Token
from mor_jax.mesh.devices import process_platform


def measure_bandwidth(size: int = 2**30) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    if process_platform() == "cpu":
        size = 2**26
    data = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(data).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        copy(data).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size / float(np.median(times))


def bench_model(
    models: Sequence[DecodeModel], settings: ServeSettings, scenario: Scenario, bandwidth: float
) -> dict[str, Any]:
    """Measure one model in one scenario, on all its devices.

    Args:
        models: the same weights on the devices of every copy.
        settings: of all models.
        scenario: how each copy is sized.
        bandwidth: bytes per second of one device.
    """
    model, copies = models[0], len(models)
    options = options_for(model, settings, scenario)
    engine = make_engine(models, options)
    begin = time.perf_counter()
    engine.warm_up(prompts=settings.prompt_length > 1)
    compile_seconds, compiled = time.perf_counter() - begin, compilations()
    requests = make_requests(model.config, settings)
    gc.collect()
    gc.freeze()  # as the server does
    measured = run_requests(engine, requests)
    gc.unfreeze()
    taken = parameter_bytes(model) + options.max_running * settings.reserve * bytes_per_position(
        model.config, settings.kv_dtype
    )
    return {
        "match": scenario.match,
        "batch": scenario.batch,
        "options": dataclasses.asdict(engine.shape),
        "copies": copies,
        "in_flight": engine.max_running,
        "parameter_bytes": copies * parameter_bytes(model),
        "kv_bytes_per_position": bytes_per_position(model.config, settings.kv_dtype),
        "bytes_of_parameters_and_reserved_keys_and_values": copies * taken,
        "warm_up_seconds": compile_seconds,
        "compilations_after_warm_up": compilations() - compiled,
        **measured,
        **_bound(model, engine, measured, settings.mesh.devices * bandwidth),
        "profile": _profile(engine, requests) if settings.profile else None,
    }


def _profile(engine: AnyEngine, requests: Sequence[Request]) -> dict[str, Any]:
    """Kernels of a dispatch with all places taken and caches half full."""
    for request in requests[: 2 * engine.shape.places]:
        engine.submit(request)
    for _ in range(max(2, 128 // engine.shape.steps)):
        engine.step()
    return profile_dispatch(engine)


def run_requests(engine: AnyEngine, requests: Sequence[Request]) -> dict[str, Any]:
    """Answer a queue of requests, and say how fast, how long they waited and what the slots held."""
    begin = time.perf_counter()
    for request in requests:
        engine.submit(request)
    first, last, counts = {}, {}, {}
    depths: dict[int, int] = {}
    steady: list[float] = []

    def take(token: Token) -> None:
        first.setdefault(token.request, token.time)
        last[token.request] = token.time
        counts[token.request] = counts.get(token.request, 0) + 1
        depths[token.depth] = depths.get(token.depth, 0) + 1

    before, steps = dataclasses.replace(engine.statistics), 0
    while engine.busy:
        for token in engine.step():
            take(token)
        now = engine.statistics
        if engine.waiting and now.block_steps > before.block_steps:
            slots = (now.block_steps - before.block_steps) * engine.shape.block_slots
            steady.append((now.block_used - before.block_used) / slots)
        before, steps = dataclasses.replace(now), steps + 1
        if steps % 64 == 0 or steps & (steps - 1) == 0:  # also in a short run
            engine.measure()
    for token in engine.drain():
        take(token)
    seconds = time.perf_counter() - begin
    total, shape = engine.statistics, engine.shape
    per_token = [(last[r] - first[r]) / (counts[r] - 1) for r in first if counts[r] > 1]
    return {
        "seconds": seconds,
        "tokens": total.tokens,
        "tokens_per_second": total.tokens / seconds,
        "time_to_first_token_seconds": _percentiles([t - begin for t in first.values()]),
        "seconds_per_token": _percentiles(per_token),
        "block_slot_use": total.block_used / max(1, total.block_steps * shape.block_slots),
        "block_slot_use_while_queued": float(np.mean(steady)) if steady else None,
        "exit_slot_use": total.exit_used / max(1, total.exit_steps * shape.exit_slots),
        "tokens_per_depth": {str(d): n / total.tokens for d, n in sorted(depths.items())},
        "peak_kv_bytes": dataclasses.asdict(total.peak),
        "statistics": dataclasses.asdict(total),
    }


def _bound(model: DecodeModel, engine: AnyEngine, measured: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """Bytes that the run had to read, weights once per copy and step and entries attended to, over the copy bandwidth.

    Each of the devices that share a copy reads its part of both, all at the same time.
    """
    total, layout = engine.statistics, kv_layout(model.config)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    repeats = model.config.recursion.num_recursions if model.config.recursion.is_sequence else 1
    entry = entry_bytes(model.config, engine.shape.kv_dtype)
    head = model.embedding_VD if model.head_VD is None else model.head_VD
    parts = {
        "block_weights": size(model.block) * repeats * total.block_steps,
        "exit_weights": (size((model.first, model.last)) + head.nbytes) * total.exit_steps,
        "keys_and_values": entry * len(model.block) * repeats * total.block_entries
        + entry * layout.edge_layers * total.exit_entries,
    }
    seconds = sum(parts.values()) / bandwidth
    return {
        "bytes_read": parts,
        "bytes_bound_tokens_per_second": measured["tokens"] / seconds,
        "fraction_of_bytes_bound": seconds / measured["seconds"],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)} if values else {}


def bench_serve(models: Sequence[str], settings: ServeSettings, done: Any = None) -> dict[str, Any]:
    """Measure models one after the other in every scenario; the first is what the others are compared with.

    Args:
        models: ``PRESET[@LAYERS]`` each.
        settings: of all of them.
        done: called with the record after every result.

    Returns:
        JSON-ready record.
    """
    copy_meshes(settings.mesh)  # too few devices are known before anything is measured
    bandwidth, device = measure_bandwidth(), jax.local_devices()[0]
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": settings.mesh.devices,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "copy_bytes_per_second": bandwidth,  # of one device
        "key_value_updates": "included",
        "results": [],
    }
    firsts: dict[int, dict[str, Any]] = {}
    for name in models:
        config = parse_model(name)
        copies, note = random_model(config, settings)
        note = {"model": name, "layers": config.unrolled_depth, "dtype": config.dtype, **note}
        for batch in settings.batches:
            first = firsts.get(batch)
            bytes_taken = "bytes_of_parameters_and_reserved_keys_and_values"
            budget = None if first is None else first[bytes_taken] / settings.mesh.data
            # with one pass a block, both ways of matching are the same
            for match in settings.matches[: 1 if first is None and kv_layout(config).passes == 1 else None]:
                result = note | bench_model(copies, settings, Scenario(match, batch, budget), bandwidth)
                first = firsts.setdefault(batch, result)
                result["ratio"] = result["tokens_per_second"] / first["tokens_per_second"]
                record["results"].append(result)
                if done is not None:
                    done(record)
        jax.clear_caches()
    return record

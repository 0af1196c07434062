"""How long other requests wait for their tokens while a long prompt is read: vanilla beside N_r=3.

Usage: python experiments/serving/beside_long_prompt.py --shape 360m --out FILE (a GPU), or --shape small --prompt 8192
--others 7 (a CPU). Others decode first alone, then beside one prompt, until its first token. Times are between two
tokens of one request as the engine hands them out: those of one dispatch come together, so most are 0, and the 99th
percentile is that of dispatches. Weights are random, and boundaries such that half of the tokens go on, or so.
"""

import dataclasses
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from long_prompts import models

from mor_jax.config import ModelConfig
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request, Token
from mor_jax.infer.sampling import Sampling
from mor_jax.model.transformer import init_params


@dataclass(frozen=True)
class Settings:
    """What every model is measured with."""

    out: Path
    """JSON file for the results."""
    shape: Literal["small", "360m"] = "small"
    """`360m`: the presets' 32 layers; `small`: 8 layers of width 128 in float32, for one core."""
    models: tuple[str, ...] = ("vanilla", "recursion")
    """Of ``long_prompts.models``."""
    prompt: int = 32768
    """Tokens of the long prompt."""
    others: int = 31
    """Requests that decode."""
    alone: int = 40
    """Dispatches before the prompt comes."""
    chunks: tuple[int | None, ...] = (None,)
    """Prompt tokens read at a time; None is the engine's choice."""
    rows: int = 4
    """Prompts read at a time."""
    steps: int = 16
    """Of a dispatch."""
    seed: int = 0
    """Of weights and prompts."""


def decode_model(config: ModelConfig, seed: int) -> DecodeModel:
    """A model with random weights; half of the tokens go on, or so."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    later = (0.0,) * (config.recursion.num_recursions - 1)
    boundaries = (-1e9, *later) if config.routing.kind == "expert" else None
    return jax.block_until_ready(prepare_weights(config, params, boundaries=boundaries))


def make_engine(model: DecodeModel, settings: Settings, chunk: int | None, tokens: int) -> Engine:
    """A warm engine in which others generate so many tokens; each sequence leaves in the step in which it may."""
    running = settings.others + 1
    pages = (settings.others * tokens + settings.prompt) // 16 + 4 * running
    options = EngineOptions(
        max_running=running,
        max_length=settings.prompt + 64,
        block_slots=running,
        exit_slots=running,
        exit_at=1,
        steps=settings.steps,
        prefill_rows=settings.rows,
        prefill_chunk=chunk,
        block_pages=pages * kv_layout(model.config).groups,
        edge_pages=pages,
        cuts=False,
        kept=0,
    )
    engine = Engine(model, options)
    engine.warm_up(prompts=False)  # one prompt alone is read, and none is scored: other programs are not compiled
    for _ in range(2):  # the second time around, all arrays are what compiled programs returned
        engine.submit(Request((1,) * 8, 2))
        for _ in engine.run():
            pass
    gc.freeze()  # as the server does
    return engine


def waits(tokens: list[Token], since: float, until: float, requests: set[int]) -> dict[str, float]:
    """Milliseconds between two tokens of one request, of those that came in a time."""
    last, found = {}, []
    for token in tokens:
        if token.request in requests and token.request in last and since < token.time <= until:
            found.append(1e3 * (token.time - last[token.request]))
        last[token.request] = token.time
    return {f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 99)} | {"most": max(found), "count": len(found)}


def measure(model: DecodeModel, settings: Settings, chunk: int | None) -> dict[str, Any]:
    """Measure one model with one size of chunk."""
    rng, vocabulary = np.random.default_rng(settings.seed), model.config.vocab_size
    most = settings.prompt - 64  # nobody ends before the long prompt has been read, but for a slow reader's
    others_tokens = min(most, settings.steps * (settings.alone + 8 + settings.prompt // 64))
    engine = make_engine(model, settings, chunk, others_tokens)
    draw = lambda index: Sampling(temperature=100.0, seed=index)  # noqa: E731
    others = {
        engine.submit(Request((int(rng.integers(0, vocabulary)),), others_tokens, draw(index)))
        for index in range(settings.others)
    }
    compiled, tokens = compilations(), []
    for _ in range(8):
        tokens += engine.step()
    begin = time.perf_counter()
    for _ in range(settings.alone):
        tokens += engine.step()
    start = time.perf_counter()
    long = engine.submit(Request(tuple(rng.integers(0, vocabulary, settings.prompt).tolist()), 2))
    first = None
    while first is None:
        fresh = engine.step()
        first = next((token.time for token in fresh if token.request == long), None)
        tokens += fresh
    alone, beside = waits(tokens, begin, start, others), waits(tokens, start, first, others)
    return {
        "prefill_chunk": engine.options.prefill_chunk,
        "asked": chunk,
        "milliseconds_between_tokens": {"alone": alone, "beside": beside},
        "p99_beside_over_alone": beside["p99"] / alone["p99"],
        "seconds_to_first_token": first - start,
        "running_at_its_first_token": engine.running,
        "compilations_after_warm_up": compilations() - compiled,
    }


def main() -> None:
    """Measure, and write the record after every result."""
    settings = tyro.cli(Settings, description=__doc__)
    device, results = jax.local_devices()[0], []
    record = {
        "settings": dataclasses.asdict(settings) | {"out": settings.out.name},
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "results": results,
    }
    for name in settings.models:
        model = decode_model(models(settings.shape)[name], settings.seed)
        for chunk in settings.chunks:
            results.append({"model": name} | measure(model, settings, chunk))
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results[-1]), file=sys.stderr)


if __name__ == "__main__":
    main()

"""What does a known prefix save? Requests with a common prompt, with and without the prefix cache, in one process.

Usage: python experiments/serving/prefix_cache.py --out FILE (a CPU core: `small`), or --shape 360m (a GPU).
All requests come at once. With the cache they share what the first of them reads; a second wave of as many finds the
prompt among what is kept. Weights are random, routers calibrated as in ``mor bench serve``. Both engines are warm, and
take turns wave by wave.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from long_prompts import models

from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.bench.serving_setup import random_model
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request


@dataclass(frozen=True)
class Settings:
    """What is asked."""

    out: Path
    """JSON file for the results."""
    shape: Literal["small", "360m"] = "small"
    """See long_prompts.py."""
    model: Literal["vanilla", "recursion", "shared"] = "recursion"
    """`recursion` and `shared` are the caches of three recursions."""
    requests: int = 64
    """Of a wave."""
    common: int = 2048
    """Tokens with which every prompt begins."""
    own: int = 32
    """Tokens that follow, another text in every request."""
    completion: int = 8
    """Tokens generated."""
    max_running: int = 32
    """Sequences decoded at the same time."""
    waves: int = 2
    """Times that all requests come, with other texts of their own."""
    kept: int = 64
    """Sequences kept by the engine with the cache."""
    seed: int = 0
    """Of weights and prompts."""


def make_engine(model: DecodeModel, settings: Settings, kept: int) -> Engine:
    """Make a warm engine."""
    length = settings.common + settings.own + settings.completion
    engine = Engine(model, EngineOptions(settings.max_running, length, kept=kept, cuts=False))
    engine.warm_up()
    return engine


def wave(engine: Engine, prompts: list[tuple[int, ...]], completion: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Serve all prompts at once: (figures, tokens)."""
    engine.reset_statistics()
    begin, first = time.perf_counter(), {}
    found: dict[int, list[int]] = {engine.submit(Request(prompt, completion)): [] for prompt in prompts}
    for token in engine.run():
        first.setdefault(token.request, token.time - begin)
        found[token.request].append(token.token)
    seconds, times = time.perf_counter() - begin, list(first.values())
    total = engine.statistics
    figures = {
        "seconds": seconds,
        "first_token_seconds": {"p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99))},
        "prompt_tokens_read": total.prompt_tokens,
        "prompt_tokens_found": total.found_tokens,
    }
    return figures, list(found.values())


def main(settings: Settings) -> None:
    """Measure, and write the file."""
    config, rng = models(settings.shape)[settings.model], np.random.default_rng(settings.seed)
    (model,), note = random_model(config, ServeSettings(calibration_rows=32, seed=settings.seed))
    engines = {"without": make_engine(model, settings, 0), "with": make_engine(model, settings, settings.kept)}
    draw = lambda count: tuple(rng.integers(0, config.vocab_size, count).tolist())  # noqa: E731
    common, before, waves = draw(settings.common), compilations(), []
    for _ in range(settings.waves):
        prompts = [common + draw(settings.own) for _ in range(settings.requests)]
        figures, tokens = {}, {}
        for name, engine in engines.items():
            figures[name], tokens[name] = wave(engine, prompts, settings.completion)
        pairs = list(zip(tokens["without"], tokens["with"], strict=True))
        old, new = figures["without"], figures["with"]
        waves.append(
            {
                **figures,
                "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
                "ratio_seconds": old["seconds"] / new["seconds"],
                "ratio_first_token_p50": old["first_token_seconds"]["p50"] / new["first_token_seconds"]["p50"],
            }
        )
        print(json.dumps(waves[-1], indent=1), flush=True)
    compiled = compilations() - before
    kept = engines["with"].pages_kept()
    engines["with"].forget_prefixes()
    after = [held for held, _ in engines["with"].pages_held()]
    result = {
        "settings": {**asdict(settings), "out": settings.out.name},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": config.dtype,
        "weights": note,
        "waves": waves,
        "compilations_after_warm_up": compiled,
        "pages_kept": kept,
        "pages_after_forgetting": after,
    }
    settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))

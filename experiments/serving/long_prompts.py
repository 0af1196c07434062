"""One long prompt at a time: time to first token, and the keys and values that it leaves; vanilla beside N_r=3.

Usage: python experiments/serving/long_prompts.py --shape 360m --out FILE (a GPU), or --shape small (a CPU core).
Weights are random and routers calibrated to the training capacities, as in ``mor bench serve``; which tokens reach a
recursion is measured on the prompt itself. Bytes are those of the pages that the engine's free lists lack, and of the
entries in them. Letters: R recursions, B rows, T tokens of a chunk.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mor_jax import presets
from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.bench.serving_setup import random_model
from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.errors import require
from mor_jax.infer.cache import CacheShape, init_cache, kv_layout
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.prefill import prefill
from mor_jax.infer.request import Request, Token

RECURSIONS = 3


@dataclass(frozen=True)
class Settings:
    """What every model is measured with."""

    out: Path
    """JSON file for the results."""
    shape: Literal["small", "360m"] = "small"
    """`360m`: the presets' 32 layers; `small`: 8 layers of width 128 in float32, for one core."""
    lengths: tuple[int, ...] = (8192, 32768)
    """Tokens of the prompts."""
    completion: int = 4
    """Tokens generated after each."""
    repeats: int = 3
    """Requests per prompt length, one after the other, all timed."""
    prefill_chunk: int = 128
    """Prompt tokens that are read at a time."""
    page_size: int = 16
    """Cache entries per page."""
    calibration_rows: int = 128
    """Rows of 256 random tokens that routers are calibrated on."""
    seed: int = 0
    """Of weights and prompts."""

    def __post_init__(self) -> None:
        require(
            bool(self.lengths) and min(self.lengths) > 1, f"lengths={self.lengths} must be more than one token each"
        )
        for name in ("completion", "repeats"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")


def models(shape: str) -> dict[str, ModelConfig]:
    """Return the models of a shape: vanilla first, then expert-choice with recursion-wise and with shared caches."""
    if shape == "360m":
        vanilla, expert = (presets.get(n).config.model for n in ("vanilla-360m", f"mor-360m-expert-r{RECURSIONS}"))
    else:
        vanilla = ModelConfig(
            vocab_size=8192, num_layers=8, d_model=128, num_heads=2, num_kv_heads=1, d_ff=352, dtype="float32"
        )
        recursion, routing = RecursionConfig(RECURSIONS, "middle_cycle"), RoutingConfig("expert")
        expert = dataclasses.replace(vanilla, recursion=recursion, routing=routing)
    shared = dataclasses.replace(expert, recursion=dataclasses.replace(expert.recursion, kv_strategy="shared"))
    return {"vanilla": vanilla, "recursion": expert, "shared": shared}


def make_engine(model: DecodeModel, settings: Settings, length: int) -> Engine:
    """Make a warm engine for one sequence."""
    options = EngineOptions(
        max_running=1,
        max_length=length + settings.completion,
        exit_at=1,
        staged=0,
        steps=RECURSIONS + 1,  # the first token is out after one dispatch
        page_size=settings.page_size,
        prefill_rows=1,
        prefill_chunk=settings.prefill_chunk,
        cuts=False,
        kept=0,  # the same prompt comes several times
    )
    engine = Engine(model, options)
    engine.warm_up()
    return engine


def serve(engine: Engine, request: Request) -> tuple[float, float, list[Token]]:
    """Run one request alone: (seconds to its first token, seconds of processors until then, its tokens).

    ``engine.statistics.peak`` then tells its bytes.

    The caches are measured only when the whole prompt has been read, so that nothing waits before.
    """
    engine.reset_statistics()
    begin, begin_work, work = time.perf_counter(), time.process_time(), 0.0
    engine.submit(request)
    tokens = []
    while engine.busy:
        tokens += engine.step()
        work = work if work or not tokens else time.process_time() - begin_work
        if engine.statistics.prompt_tokens == len(request.prompt) - 1:
            engine.measure()
    engine.step()  # gives the pages back
    engine.drain()
    return tokens[0].time - begin, work, tokens


def pass_shares(model: DecodeModel, text: tuple[int, ...], settings: Settings) -> list[float]:
    """Return f_r, the share of a text's tokens that reach each recursion, by reading it chunk by chunk."""
    chunk, passes = settings.prefill_chunk, kv_layout(model.config).passes
    cache = init_cache(model.config, CacheShape(1, len(text), settings.page_size))
    place_B, reached_R = jnp.zeros(1, jnp.int32), np.zeros(passes)
    for start in range(0, len(text), chunk):
        part = text[start : start + chunk]
        tokens_BT = np.zeros((1, chunk), np.int32)
        tokens_BT[0, : len(part)] = part
        sizes = (np.array([value], np.int32) for value in (start, len(part), passes))
        cache, output = prefill(model, cache, place_B, tokens_BT, *sizes)
        depth_T = np.asarray(output.depth_BT)[0, : len(part)]
        reached_R += [(depth_T > r).sum() for r in range(passes)]
    return [float(count / len(text)) for count in reached_R]


def expected_share(config: ModelConfig, shares: list[float], layers: int) -> float:
    """Bytes over vanilla's by the formula: (2 + L_block sum_r f_r) / layers, the sum 1 where caches are shared."""
    layout = kv_layout(config)
    total = sum(shares) if layout.groups > 1 else 1.0
    return (layout.edge_layers + layout.block_layers * total) / layers


def measure(model: DecodeModel, settings: Settings, length: int, layers: int) -> dict[str, Any]:
    """Measure one model with prompts of one length.

    Args:
        model: calibrated.
        settings: of all models.
        length: tokens of the prompt.
        layers: of the vanilla model.
    """
    engine = make_engine(model, settings, length)
    prompt = np.random.default_rng(settings.seed).integers(0, model.config.vocab_size, length)
    request, compiled = Request(tuple(prompt.tolist()), settings.completion), compilations()
    seconds, processor, tokens = [], [], []
    for _ in range(settings.repeats):
        first, work, tokens = serve(engine, request)
        seconds.append(first)
        processor.append(work)
    recompiled, peak = compilations() - compiled, engine.statistics.peak
    cached = (*request.prompt, *(token.token for token in tokens[:-1]))  # the last token is never cached
    shares = pass_shares(model, cached, settings) if kv_layout(model.config).passes > 1 else [1.0]
    return {
        "prompt_tokens": length,
        "cached_tokens": len(cached),
        "time_to_first_token_seconds": seconds,
        "median_time_to_first_token_seconds": float(np.median(seconds)),
        # on a CPU that others use too, this is the time that can be compared
        "processor_seconds_to_first_token": processor,
        "median_processor_seconds_to_first_token": float(np.median(processor)),
        "prompt_tokens_per_second": length / float(np.median(seconds)),
        "peak_kv_bytes": dataclasses.asdict(peak),
        "shares_reaching_each_recursion": shares,
        "expected_kv_share": expected_share(model.config, shares, layers),
        "compilations_after_warm_up": recompiled,
        "options": dataclasses.asdict(engine.shape),
    }


def compare(results: list[dict[str, Any]]) -> None:
    """Add the ratios to the vanilla model at the same length."""
    for result in results:
        vanilla = next(r for r in results if r["prompt_tokens"] == result["prompt_tokens"])
        for name in ("time_to_first_token", "processor_seconds_to_first_token"):
            median = next(key for key in result if key.startswith(f"median_{name}"))
            result[f"{name}_over_vanilla"] = result[median] / vanilla[median]
        for kind in ("used", "allocated"):
            ratio = result["peak_kv_bytes"][kind] / vanilla["peak_kv_bytes"][kind]
            result[f"{kind}_kv_share"] = ratio


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as Markdown."""
    lines = [
        "| prompt | model | reach each recursion | first token, s | over vanilla | processor, s | over vanilla | "
        "KV used, MiB | allocated | used over vanilla | formula |",
        "|---" * 11 + "|",
    ]
    for result in sorted(results, key=lambda r: r["prompt_tokens"]):
        shares = ", ".join(f"{share:.3f}" for share in result["shares_reaching_each_recursion"])
        peak = result["peak_kv_bytes"]
        cells = (
            f"{result['prompt_tokens']:,}",
            result["model"],
            "" if result["model"] == "vanilla" else shares,
            f"{result['median_time_to_first_token_seconds']:.2f}",
            f"{result['time_to_first_token_over_vanilla']:.2f}",
            f"{result['median_processor_seconds_to_first_token']:.2f}",
            f"{result['processor_seconds_to_first_token_over_vanilla']:.2f}",
            f"{peak['used'] / 2**20:.2f}",
            f"{peak['allocated'] / 2**20:.2f}",
            f"{result['used_kv_share']:.4f}",
            f"{result['expected_kv_share']:.4f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(settings: Settings, configs: dict[str, ModelConfig]) -> dict[str, Any]:
    """Measure all models one after the other, and write the record after every result."""
    device, results = jax.local_devices()[0], []
    record = {
        "command": sys.argv,
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
        "device": device.device_kind,
        "platform": device.platform,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "python": sys.version.split()[0]},
        "results": results,
    }
    layers = configs["vanilla"].num_layers
    calibration = ServeSettings(calibration_rows=settings.calibration_rows, seed=settings.seed)
    for name, config in configs.items():
        require(config.unrolled_depth == layers, f"{name}: {config.unrolled_depth} layers beside vanilla's {layers}")
        (model,), note = random_model(config, calibration)
        for length in settings.lengths:
            head = {"model": name, "layers": layers, "dtype": config.dtype, **note}
            results.append(head | measure(model, settings, length, layers))
            compare(results)
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, {length}: {results[-1]['median_time_to_first_token_seconds']:.2f} s", file=sys.stderr)
        jax.clear_caches()
    return record


def main() -> None:
    """Run, write JSON and print the table."""
    settings = tyro.cli(Settings, description=__doc__)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    print(table(run(settings, models(settings.shape))["results"]))


if __name__ == "__main__":
    main()

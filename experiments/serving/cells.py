"""Tokens per second and waiting times at fixed numbers of sequences in flight, for source trees in turn.

    PYTHONPATH=TREE/src python experiments/serving/cells.py vanilla-360m:32 vanilla-360m:32:int8 --label TREE --out FILE

A cell is `MODEL:SEQUENCES[:int8]`: so many requests run, and an eighth more wait; each that ends is followed by the
next. Prompts are 64 random tokens, completions 256 +- 64, drawn at temperature 100; weights are random and boundaries
0, so that half of the tokens go on. Run it for one tree after the other, on one machine, with the same `--out`:
results are added after each cell. The engine is that of the tree that PYTHONPATH names; nothing else of it is used.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from mor_jax import presets
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request, Token
from mor_jax.infer.sampling import Sampling
from mor_jax.model.transformer import init_params

_LONGEST, _PROMPT = 512, 64


@dataclass(frozen=True)
class Arguments:
    """Options of the script."""

    cells: Annotated[tuple[str, ...], tyro.conf.Positional]
    """MODEL:SEQUENCES or MODEL:SEQUENCES:int8."""
    label: str
    """Names the tree in the results."""
    out: Path
    """JSON file; results are added."""
    seconds: float = 15.0
    """Measured, of each cell."""
    ramp: float = 1.0
    """Seconds before that are not."""
    steps: int = 16
    """Of a dispatch."""


def main() -> int:
    """Measure the cells."""
    options = tyro.cli(Arguments, description=__doc__)
    known: dict[str, Any] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "results": []}
    if options.out.exists():
        known = json.loads(options.out.read_text(encoding="utf-8"))
    for cell in options.cells:
        name, running, *kind = cell.split(":")
        found = measure(make_model(name), int(running), "int8" if kind == ["int8"] else "model", options)
        known["results"].append({"cell": cell, "tree": options.label, "command": " ".join(sys.argv[1:]), **found})
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(options.label, cell, f"{found['tokens_per_second']:.0f} tokens/s", flush=True)
    return 0


def make_model(name: str) -> DecodeModel:
    """Return a preset's model with random weights."""
    config = presets.get(name).config.model
    boundaries = None
    if config.routing.kind == "expert":
        boundaries = (-1e9, *(0.0,) * (config.recursion.num_recursions - 1))
    return prepare_weights(
        config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)), boundaries=boundaries
    )


def measure(model: DecodeModel, running: int, kv_dtype: Any, settings: Arguments) -> dict[str, Any]:
    """Keep ``running`` requests in flight, and note every token after the ramp."""
    longest = min(_LONGEST, model.config.context_length)
    options = EngineOptions(
        max_running=running,
        max_length=longest,
        block_slots=running,
        exit_slots=running,
        exit_at=1,
        steps=settings.steps,
        cuts=False,
        kept=0,
        kv_dtype=kv_dtype,
    )
    engine, generator = Engine(model, options), np.random.default_rng(0)
    engine.warm_up()
    compiled = compilations()
    sent: dict[Any, float] = {}

    def submit() -> None:
        length = int(np.clip(generator.normal(256, 64), 1, longest - _PROMPT - 1))
        prompt = tuple(generator.integers(0, model.config.vocab_size, _PROMPT).tolist())
        sent[engine.submit(Request(prompt, length, Sampling(temperature=100.0, seed=len(sent))))] = time.perf_counter()

    for _ in range(running + max(1, running // 8)):
        submit()
    start, tokens = time.perf_counter() + settings.ramp, []
    while time.perf_counter() < start + settings.seconds:
        for token in engine.step():
            tokens.append(token)
            if token.finished:
                submit()
    spent = time.perf_counter() - start
    return waits(tokens, sent, start) | {
        "tokens_per_second": sum(token.time >= start for token in tokens) / spent,
        "seconds": spent,
        "block_use": engine.statistics.block_used / max(1, engine.statistics.block_steps * running),
        "compilations_after_warm_up": compilations() - compiled,
    }


def waits(tokens: list[Token], sent: dict[Any, float], start: float) -> dict[str, Any]:
    """Times after ``start`` in milliseconds, by percentile: to a request's first token, between two of its tokens."""
    last: dict[Any, float] = {}
    first: list[float] = []
    between: list[float] = []
    for token in tokens:
        times, before = (between, last[token.request]) if token.request in last else (first, sent[token.request])
        if token.time >= start:
            times.append(1e3 * (token.time - before))
        last[token.request] = token.time
    named = {"first_token_ms": first, "between_tokens_ms": between}
    return {name: {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)} for name, times in named.items() if times}


if __name__ == "__main__":
    sys.exit(main())

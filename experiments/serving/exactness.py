"""Does the engine give every request what the full causal forward pass gives? 200 requests at random times, one run.

Usage: python experiments/serving/exactness.py RUN --out FILE. Greedy tokens, their log-probabilities and depths are
compared with full forward passes; a token that differs where the two best logits are within 1e-4 is counted apart.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mor_jax
from mor_jax.infer.compilations import compilations
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request, Token
from mor_jax.model.forward import forward

REQUESTS, MARGIN = 200, 1e-4


def draw_requests(rng: np.random.Generator, vocabulary: int, length: int) -> list[Request]:
    """Prompts and completions of random lengths."""
    prompts = [rng.integers(0, vocabulary, rng.integers(1, length // 2)) for _ in range(REQUESTS)]
    return [Request(tuple(p.tolist()), int(rng.integers(1, length - len(p)))) for p in prompts]


def serve(engine: Engine, requests: list[Request], rng: np.random.Generator) -> list[list[Token]]:
    """Submit a few requests before every step, and collect the tokens of each."""
    found: dict[int, list[Token]] = {}
    left = list(requests)
    while left or engine.busy:
        for request in [left.pop(0) for _ in range(min(len(left), int(rng.integers(0, 8))))]:
            found[engine.submit(request)] = []
        for token in engine.step():
            found[token.request].append(token)
    for token in engine.drain():
        found[token.request].append(token)
    return list(found.values())


def compare(run: Any, config: Any, requests: list[Request], results: list[list[Token]], length: int) -> dict[str, Any]:
    """Compare every token with the full forward pass over its request's whole text."""
    compared = mismatches = close = depths = 0
    largest = 0.0
    for request, result in zip(requests, results, strict=True):
        row = np.zeros((1, length), np.int32)
        whole = [*request.prompt, *(t.token for t in result)]
        row[0, : len(whole)] = whole
        logits_TV, depth_T = (np.asarray(x[0]) for x in run(row))
        for nth, token in enumerate(result):
            logits_V = logits_TV[len(request.prompt) - 1 + nth].astype(np.float64)
            expected = logits_V[token.token] - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()
            largest = max(largest, abs(token.log_probability - expected))
            depths += token.depth != depth_T[len(request.prompt) - 1 + nth]
            compared += 1
            if token.token != logits_V.argmax():
                near = logits_V.max() - logits_V[token.token] < MARGIN
                close, mismatches = close + near, mismatches + (not near)
    return {
        "requests": len(requests),
        "tokens": compared,
        "mismatches": int(mismatches),
        "differences_within_margin": int(close),
        "depth_mismatches": int(depths),
        "largest_log_probability_difference": largest,
    }


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = mor_jax.load(arguments.run).model
    from mor_jax.interop.sources import open_model
    from mor_jax.runs.restore import restore_run

    restored, params, config = restore_run(arguments.run), open_model(arguments.run).params, model.config
    length, rng = config.context_length, np.random.default_rng(0)
    engine = Engine(model, EngineOptions(max_running=12, max_length=length, prefill_chunk=32))
    engine.warm_up()
    before, requests = compilations(), draw_requests(rng, config.vocab_size, length)
    results = serve(engine, requests, rng)
    recompiled = compilations() - before

    @jax.jit
    def run(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = forward(config, params, tokens_BT, mode="threshold", execution="scan")
        assert output.trace is not None
        return output.logits, output.trace.depth_BT

    record = {
        "command": sys.argv,
        "dtype": config.dtype,
        "step": restored.step,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "compilations_after_warm_up": recompiled,
        **compare(run, config, requests, results, length),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

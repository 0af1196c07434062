"""One model's engines of one source tree under load: the process that `cells.py` starts and asks.

A line of JSON comes, a line goes: `{"compile": [32, "model"]}` builds and warms the engine for so many sequences and
that dtype of keys and values, `{"time": [32, "model"], "seconds": 3}` puts load on it and measures. The engine is that
of the tree that PYTHONPATH names; nothing else of it is used, so that old trees can be asked.
"""

import gc
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from mor_jax import presets
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.request import Request, Token
from mor_jax.infer.sampling import Sampling
from mor_jax.model.transformer import init_params

_LONGEST, _PROMPT, _MEAN, _DEVIATION = 512, 64, 256, 64
_RAMP, _RAMP_AT_MOST = 0.5, 4.0


def main() -> int:
    """Answer until the input ends."""
    model, engines = make_model(sys.argv[1]), {}
    answer({"jax": jax.__version__, "device": jax.devices()[0].device_kind})
    for line in sys.stdin:
        asked = json.loads(line)
        running, kv_dtype = asked.get("compile") or asked["time"]
        start = time.perf_counter()
        if "compile" in asked:
            engines[running, kv_dtype] = warm_engine(model, running, kv_dtype)
            answer({"warm_up_seconds": time.perf_counter() - start})
        else:
            answer(measure(engines[running, kv_dtype], asked["seconds"]))
    return 0


def answer(found: dict[str, Any]) -> None:
    """Send a line."""
    print(json.dumps(found), flush=True)


def make_model(name: str) -> DecodeModel:
    """Return a preset's model with random weights, and boundaries 0: half of the tokens go on."""
    config = presets.get(name).config.model
    boundaries = None
    if config.routing.kind == "expert":
        boundaries = (-1e9, *(0.0,) * (config.recursion.num_recursions - 1))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return prepare_weights(config, params, boundaries=boundaries)


def warm_engine(model: DecodeModel, running: int, kv_dtype: Any) -> Engine:
    """Compile an engine, but not what scores prompts, which nobody asks for here."""
    options = EngineOptions(
        max_running=running,
        max_length=min(_LONGEST, model.config.context_length),
        block_slots=running,
        exit_slots=running,
        exit_at=1,
        cuts=False,
        kept=0,
        kv_dtype=kv_dtype,
    )
    engine = Engine(model, options)
    engine.warm_up(prompts=False)
    load = Load(engine)
    several = min(running, 2 * (engine.options.prefill_rows or 4))
    for requests in (several, 1) * 2:  # the second time around, all arrays are what compiled programs returned
        for _ in range(requests):
            load.submit(tokens=24)
        for _ in engine.run():
            pass
    gc.collect()
    gc.freeze()  # as the server does; of an old tree too, whose tokens this process keeps until it has counted them
    return engine


class Load:
    """Requests for an engine: random prompts, tokens drawn at temperature 100."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._generator = engine, np.random.default_rng(0)
        self.sent: dict[int, float] = {}

    def submit(self, tokens: int | None = None) -> None:
        """Send one, and note when."""
        longest = self._engine.shape.max_length - _PROMPT - 1
        length = tokens or int(self._generator.normal(_MEAN, _DEVIATION))
        prompt = tuple(self._generator.integers(0, self._engine.model.config.vocab_size, _PROMPT).tolist())
        sampling = Sampling(temperature=100.0, seed=len(self.sent))
        number = self._engine.submit(Request(prompt, min(max(1, length), longest), sampling))
        self.sent[number] = time.perf_counter()


def measure(engine: Engine, seconds: float) -> dict[str, Any]:
    """Keep the engine full, each request that ends followed by the next, and note every token after a ramp.

    The ramp ends when as many requests have ended as run at a time, or after 4 s. What runs at the end is cancelled.
    """
    load, compiled, running = Load(engine), compilations(), engine.max_running
    for _ in range(running + max(1, running // 8)):
        load.submit()
    begin, ended = time.perf_counter(), 0
    start, tokens, used, steps = None, [], (0, 0), []
    while start is None or time.perf_counter() < start + seconds:
        before = time.perf_counter(), time.thread_time()
        made = engine.step()
        if start is not None:
            steps.append((time.perf_counter() - before[0], time.thread_time() - before[1]))
        for token in made:
            tokens.append(token)
            if token.finished:
                ended += 1
                load.submit()
        now = time.perf_counter()
        full = now >= begin + _RAMP and ended >= running
        if start is None and (full or now >= begin + _RAMP_AT_MOST):
            start, used = now, (engine.statistics.block_used, engine.statistics.block_steps)
    spent = time.perf_counter() - start
    used = engine.statistics.block_used - used[0], engine.statistics.block_steps - used[1]
    for number in load.sent:
        engine.cancel(number)
    for _ in engine.run():
        pass
    return {
        "tokens_per_second": sum(token.time >= start for token in tokens) / spent,
        "seconds": spent,
        "ramp_seconds": start - begin,
        **waits(tokens, load.sent, start),
        **step_times(steps),
        "block_use": used[0] / (used[1] * running) if used[1] else None,
        "prompts_at_a_time": engine.options.prefill_rows,
        "compilations_after_warm_up": compilations() - compiled,
    }


def step_times(steps: list[tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of ``Engine.step``: by the clock, and of the thread, which do not count what it waits for."""
    percentiles = lambda times: {f"p{q}": float(1e3 * np.percentile(times, q)) for q in (50, 99)}  # noqa: E731
    clock, thread = zip(*steps, strict=True)
    return {"steps": len(steps), "step_ms": percentiles(clock), "step_thread_ms": percentiles(thread)}


def waits(tokens: list[Token], sent: dict[int, float], start: float) -> dict[str, Any]:
    """Milliseconds by percentile, of what ends after ``start``.

    From a request's sending to its first token; between two of its tokens (those of one dispatch come together); and,
    a mean per request, from its first to its last token over their number less one.
    """
    began: dict[int, float] = {}
    last: dict[int, tuple[float, int]] = {}
    first: list[float] = []
    between: list[float] = []
    each: list[float] = []
    for token in tokens:
        number, late = token.request, token.time >= start
        before, count = last.get(number, (sent[number], 0))
        last[number] = (token.time, count + 1)
        began.setdefault(number, token.time)
        if late:
            (between if count else first).append(1e3 * (token.time - before))
        if late and token.finished and count:
            each.append(1e3 * (token.time - began[number]) / count)
    named = {"first_token_ms": first, "between_tokens_ms": between, "per_token_ms": each}
    return {name: {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)} for name, times in named.items() if times}


if __name__ == "__main__":
    sys.exit(main())

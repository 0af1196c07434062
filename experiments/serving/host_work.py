"""What the engine's host does per dispatch: milliseconds of its thread, with nothing behind it that computes.

    python experiments/serving/host_work.py --out FILE

The load is that of `cells.py`: prompts of 64 tokens, completions of 256 +- 64, an eighth more requests than run. In
place of the compiled programs stands a device that decides as they do (who starts, leaves, ends), draws depths (half of
the tokens go on) and takes no time; its own time, and what the call of a compiled program would take, are not counted.
A device that needs less per dispatch than the host waits for it.
"""

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from cells_worker import Load

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.infer import engine as engine_module
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_state import COUNTERS, DONE, ENTERING, FREE, LEAVING, RUNNING, WAITING, Control
from mor_jax.infer.exchange import Orders
from mor_jax.infer.prefill import PrefillOutput
from mor_jax.model.transformer import init_params


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """JSON file for the results."""
    sequences: tuple[int, ...] = (32, 256)
    """In flight."""
    recursions: tuple[int, ...] = (1, 3, 4)
    """1 is vanilla."""
    dispatches: int = 100
    """Counted, after as many as fill the engine."""
    freeze: bool = True
    """Spare the collector what there is when the load begins, as the server does."""


def make_model(recursions: int) -> DecodeModel:
    """A tiny model; the host does not see more of a model than its layout."""
    config = ModelConfig(vocab_size=64, num_layers=14, d_model=32, num_heads=2, num_kv_heads=1, d_ff=32)
    boundaries = None
    if recursions > 1:
        recursion, routing = RecursionConfig(recursions, "middle_cycle"), RoutingConfig("expert")
        config = dataclasses.replace(config, recursion=recursion, routing=routing)
        boundaries = (0.0,) * recursions
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return prepare_weights(config, params, boundaries=boundaries)


class Device:
    """What the programs decide, without what they compute."""

    def __init__(self, engine: Engine, recursions: int) -> None:
        self.shape, self.recursions, self.seconds = engine.shape, recursions, 0.0
        self.random = np.random.default_rng(0)
        self.phase_S, self.order_S, self.remaining_S, self.passes_S, self.left_S = np.zeros((5, self.shape.places), int)

    def dispatch(self, model: Any, state: Any, control: Control, *, shape: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        """Stand in for ``stages.dispatch``."""
        began = time.thread_time()
        self.phase_S[control.admit] = WAITING
        for mine_S, theirs in ((self.order_S, control.requests.order), (self.remaining_S, control.requests.remaining)):
            mine_S[control.admit] = theirs[control.admit]
        packed_XFE, used = np.zeros((shape.steps, 5, shape.exit_slots), np.int32), 0
        packed_XFE[:, 0] = -1
        for step in range(shape.steps):
            self._promote()
            self._exit(packed_XFE[step])
            runs_S = self.phase_S == RUNNING
            used += runs_S.sum()
            self.left_S -= runs_S
            self.phase_S[runs_S & (self.left_S == 0)] = LEAVING
        counts = {"block_steps": shape.steps, "block_used": used}
        counters = np.asarray([counts.get(name, 0) for name in COUNTERS], np.int32)
        self.seconds += time.thread_time() - began
        return state, packed_XFE, counters

    def _promote(self) -> None:
        running = np.sum((self.phase_S > WAITING) & (self.phase_S < DONE))
        waits = np.flatnonzero(self.phase_S == WAITING)
        starts = waits[np.argsort(self.order_S[waits])][: self.shape.max_running - running]
        self.phase_S[starts] = ENTERING

    def _exit(self, packed_FE: np.ndarray) -> None:
        leaves_S = self.phase_S == LEAVING
        leaves = np.flatnonzero(leaves_S)
        self.remaining_S -= leaves_S
        ends_S = leaves_S & (self.remaining_S <= 0)
        packed_FE[0, : leaves.size], packed_FE[2, : leaves.size] = leaves, self.passes_S[leaves]
        packed_FE[4, : leaves.size] = ends_S[leaves]
        self.phase_S[ends_S] = DONE
        enters_S = (leaves_S & ~ends_S) | (self.phase_S == ENTERING)
        self.passes_S = np.where(enters_S, self._depths(enters_S.size), self.passes_S)
        self.left_S[enters_S], self.phase_S[enters_S] = self.passes_S[enters_S], RUNNING

    def _depths(self, shape: int | tuple[int, ...]) -> np.ndarray:
        return np.minimum(self.random.geometric(0.5, shape), self.recursions)

    def prefill(self, model: Any, cache: Any, place_B: Any, tokens_BT: Any, *_: Any) -> tuple[Any, PrefillOutput]:
        """Stand in for ``prefill.prefill``."""
        began = time.thread_time()
        depth_BT: Any = self._depths(tokens_BT.shape).astype(np.int32)
        self.seconds += time.thread_time() - began
        return cache, PrefillOutput(None, depth_BT)

    def exchange(self, state: Any, orders: Orders) -> Any:
        """Stand in for ``exchange.exchange``."""
        self.phase_S[np.asarray(orders.drop_S)[: self.shape.places]] = FREE
        return state


def make_engine(recursions: int, sequences: int) -> tuple[Engine, Device]:
    """An engine as in ``cells_worker``, on a device that takes no time."""
    options = EngineOptions(sequences, 512, sequences, sequences, exit_at=1, cuts=False, kept=0)
    engine = Engine(make_model(recursions), options)
    device = Device(engine, recursions)
    engine._program = device.dispatch
    engine_module.prefill, engine_module.exchange = device.prefill, device.exchange
    jax.device_get = lambda tree: tree
    return engine, device


def measure(recursions: int, sequences: int, dispatches: int, freeze: bool) -> dict[str, Any]:
    """Keep the engine full for so many dispatches."""
    engine, device = make_engine(recursions, sequences)
    if freeze:
        gc.freeze()
    load, spent, tokens = Load(engine), [], 0
    for _ in range(sequences + max(1, sequences // 8)):
        load.submit()
    ramp = 3 * 256 * recursions // engine.options.steps
    for nth in range(ramp + dispatches):
        if nth == ramp:
            engine.reset_statistics()
        start, inside = time.thread_time(), device.seconds
        made = engine.step()
        spent.append(time.thread_time() - start - (device.seconds - inside))
        for token in made:
            if token.finished:
                load.submit()
        tokens += len(made) * (nth >= ramp)
    statistics, host_ms = engine.statistics, 1e3 * np.asarray(spent[ramp:])
    return {
        "host_ms_per_dispatch": {"mean": host_ms.mean(), "p50": float(np.median(host_ms)), "most": host_ms.max()},
        "host_us_per_token": 1e3 * host_ms.sum() / tokens,
        "tokens_per_dispatch": tokens / dispatches,
        "block_use": statistics.block_used / (statistics.block_steps * sequences),
        "chunks_per_dispatch": statistics.prefills / dispatches,
        "prompts_per_chunk": statistics.prompt_tokens / 63 / max(1, statistics.prefills),
    }


def main() -> None:
    """Measure, and write the record after every result."""
    settings, results = tyro.cli(Settings, description=__doc__), []
    record = {"settings": dataclasses.asdict(settings) | {"out": settings.out.name}, "results": results}
    for recursions in settings.recursions:
        for sequences in settings.sequences:
            found = measure(recursions, sequences, settings.dispatches, settings.freeze)
            results.append({"recursions": recursions, "sequences": sequences, **found})
            settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Engines on several devices: one that shares its weights and caches over `tensor`, and copies of it side by side.

Copies know nothing of each other. Each request belongs to one of them from beginning to end, so that nothing but
tokens ever leaves a copy's devices.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from mor_jax.config import MeshConfig
from mor_jax.errors import require
from mor_jax.infer.cache import KvUsage
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineMesh, EngineOptions
from mor_jax.infer.engine_shape import EngineShape
from mor_jax.infer.engine_statistics import EngineStatistics
from mor_jax.infer.request import Request, Token
from mor_jax.mesh.devices import Device
from mor_jax.mesh.mesh import make_mesh


def copy_meshes(mesh: EngineMesh, devices: Sequence[Device] | None = None) -> tuple[Mesh | None, ...]:
    """Return the mesh of every copy, for ``prepare_weights``.

    Args:
        mesh: how many copies of how many devices.
        devices: to choose from, in order; None takes those of this process.

    Raises:
        UserError: there are not so many.
    """
    devices, count = jax.local_devices() if devices is None else devices, mesh.devices
    require(
        count <= len(devices),
        f"mesh.data={mesh.data} x mesh.tensor={mesh.tensor} = {count} devices, but there are {len(devices)}",
    )
    if count == 1:
        return (None,)
    whole = make_mesh(MeshConfig(data=mesh.data, tensor=mesh.tensor), devices[:count])
    parts = (whole.devices[:, nth : nth + 1] for nth in range(mesh.data))
    return tuple(Mesh(part, whole.axis_names, axis_types=whole.axis_types) for part in parts)


class Replicas:
    """Copies of an engine behind the surface of one; a request goes to the copy that has the fewest to answer.

    Args:
        models: the same weights on the devices of every copy.
        options: sizes of each copy.
    """

    def __init__(self, models: Sequence[DecodeModel], options: EngineOptions) -> None:
        self.options, self.engines = options, tuple(Engine(model, options) for model in models)
        # a thread each: launching a dispatch may wait for a device that has something to decide
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="replica")
        self._next_number = 0
        self._home: dict[int, tuple[int, int]] = {}
        """Of every unfinished request: its copy, and its number there."""
        self._numbers: list[dict[int, int]] = [{} for _ in self.engines]
        """The way back, per copy."""

    @property
    def shape(self) -> EngineShape:
        """Sizes of each copy."""
        return self.engines[0].shape

    @property
    def max_running(self) -> int:
        """Sequences decoded at the same time."""
        return sum(engine.max_running for engine in self.engines)

    @property
    def places(self) -> int:
        """Sequences that can hold pages at the same time."""
        return sum(engine.places for engine in self.engines)

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return sum(engine.waiting for engine in self.engines)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return sum(engine.running for engine in self.engines)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return any(engine.busy for engine in self.engines)

    @property
    def statistics(self) -> EngineStatistics:
        """Sums over all copies (of the peaks too, although they need not have been at the same time)."""
        all_of = [engine.statistics for engine in self.engines]
        names = (f.name for f in dataclasses.fields(EngineStatistics) if f.name != "peak")
        sums = {name: sum(getattr(one, name) for one in all_of) for name in names}
        return EngineStatistics(**sums, peak=_add([one.peak for one in all_of]))

    def check(self, request: Request) -> None:
        """Raise ``UserError`` if a request can never be served."""
        self.engines[0].check(request)

    def submit(self, request: Request) -> int:
        """Queue a request; see ``Engine.submit``."""
        copy = min(range(len(self.engines)), key=lambda nth: self.engines[nth].waiting + self.engines[nth].running)
        there, number = self.engines[copy].submit(request), self._next_number
        self._next_number += 1
        self._home[number], self._numbers[copy][there] = (copy, there), number
        return number

    def cancel(self, number: int) -> None:
        """Drop a request, wherever it is; it gives no more tokens. An unknown or finished number is ignored."""
        if number in self._home:
            copy, there = self._forget(number)
            self.engines[copy].cancel(there)

    def _forget(self, number: int) -> tuple[int, int]:
        copy, there = self._home.pop(number)
        del self._numbers[copy][there]
        return copy, there

    def step(self) -> list[Token]:
        """Step every copy that has something to do, all at the same time; see ``Engine.step``."""
        busy = [copy for copy, engine in enumerate(self.engines) if engine.busy]
        found = list(self._threads.map(lambda copy: self.engines[copy].step(), busy))
        return [token for copy, tokens in zip(busy, found, strict=True) for token in self._named(copy, tokens)]

    def drain(self) -> list[Token]:
        """Return the tokens of dispatches that are still on their way."""
        return [token for copy, engine in enumerate(self.engines) for token in self._named(copy, engine.drain())]

    def _named(self, copy: int, tokens: Sequence[Token]) -> Iterator[Token]:
        """Tokens under the numbers that ``submit`` gave."""
        for token in tokens:
            number = self._numbers[copy][token.request]
            if token.finished:
                self._forget(number)
            yield token._replace(request=number)

    def run(self) -> Iterator[Token]:
        """Yield tokens until nothing is left to do."""
        while self.busy:
            yield from self.step()
        yield from self.drain()

    def warm_up(self, *, prompts: bool = True) -> None:
        """Compile everything that serving runs, once per copy; see ``Engine.warm_up``."""
        list(self._threads.map(lambda engine: engine.warm_up(prompts=prompts), self.engines))

    def reset_statistics(self) -> None:
        """Begin to count anew."""
        for engine in self.engines:
            engine.reset_statistics()

    def measure(self) -> KvUsage:
        """Bytes of keys and values now (waits for the devices); remembers the largest."""
        return _add([engine.measure() for engine in self.engines])

    def pages_held(self) -> list[tuple[int, int]]:
        """Pages that sequences hold and pages that there are, of all block pools and all edge pools (waits)."""
        per_pool = zip(*(engine.pages_held() for engine in self.engines), strict=True)
        return [(sum(held for held, _ in pool), sum(pages for _, pages in pool)) for pool in per_pool]

    def pages_kept(self) -> list[int]:
        """See ``Engine.pages_kept``; of all copies."""
        return [sum(pool) for pool in zip(*(engine.pages_kept() for engine in self.engines), strict=True)]

    def forget_prefixes(self) -> None:
        """Give back what is kept of sequences that have ended."""
        for engine in self.engines:
            engine.forget_prefixes()


def _add(usages: Sequence[KvUsage]) -> KvUsage:
    return KvUsage(*map(sum, zip(*map(dataclasses.astuple, usages), strict=True)))


AnyEngine = Engine | Replicas


def make_engine(models: Sequence[DecodeModel], options: EngineOptions) -> AnyEngine:
    """Make an engine, or copies of it if the model is there several times."""
    return Engine(models[0], options) if len(models) == 1 else Replicas(models, options)

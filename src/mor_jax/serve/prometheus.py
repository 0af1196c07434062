"""What ``GET /metrics`` tells, in Prometheus' text form."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mor_jax.infer.compilations import compilations
from mor_jax.infer.replicas import AnyEngine
from mor_jax.serve.job import PromptSequence, Update
from mor_jax.versions import installed_versions

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class EngineReading:
    """The engine at one moment."""

    waiting: int = 0
    """Sequences without a place."""
    running: int = 0
    """Sequences with one."""
    pages: tuple[tuple[int, int], ...] = ()
    """Held and there are, of the block's pool and the edge's."""
    block_used: int = 0
    """Block slots that held a token."""
    block_slots: int = 0
    """All block slots of all passes."""

    @classmethod
    def take(cls, engine: AnyEngine) -> "EngineReading":
        """Look; in the engine's thread."""
        total = engine.statistics
        return cls(
            waiting=engine.waiting,
            running=engine.running,
            pages=tuple(engine.pages_held()),
            block_used=total.block_used,
            block_slots=total.block_steps * engine.shape.block_slots,
        )

    def collect(self) -> Iterator[Metric]:
        """The engine's own figures."""
        yield GaugeMetricFamily("mor_waiting_sequences", "Sequences that wait for a place.", self.waiting)
        yield GaugeMetricFamily("mor_running_sequences", "Sequences that have a place.", self.running)
        used = GaugeMetricFamily("mor_pages_used", "Cache pages that sequences hold.", labels=["pool"])
        there = GaugeMetricFamily("mor_pages", "Cache pages that there are.", labels=["pool"])
        for pool, (held, pages) in zip(("block", "edge"), self.pages, strict=False):
            used.add_metric([pool], held)
            there.add_metric([pool], pages)
        yield from (used, there)
        yield CounterMetricFamily("mor_block_slots_used", "Block slots that held a token.", self.block_used)
        yield CounterMetricFamily("mor_block_slots", "Block slots of all passes over the block.", self.block_slots)
        yield CounterMetricFamily("mor_compilations", "Programs compiled by this process.", compilations())


class Metrics:
    """The figures of one server.

    Args:
        model: its name.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.reading = EngineReading()
        self.registry.register(self)
        where = self.registry
        self.requests = Counter("mor_requests", "HTTP requests.", ["path", "status"], registry=where)
        self.open_requests = Gauge("mor_open_requests", "Completion requests not yet answered.", registry=where)
        self.draining = Gauge("mor_draining", "1 while no new requests are taken.", registry=where)
        self.step_time = Gauge(
            "mor_seconds_since_step", "Since the engine finished a step; 0 while it has nothing to do.", registry=where
        )
        self.accepted = Counter("mor_accepted_completions", "Completions begun or queued.", registry=where)
        self.completions = Counter("mor_completions", "Completions by how they ended.", ["finish"], registry=where)
        for finish in ("stop", "length", "cancelled", "error"):
            self.completions.labels(finish)  # there from the beginning, as 0
        self.prompt_tokens = Counter("mor_prompt_tokens", "Tokens of accepted prompts.", registry=where)
        self.tokens = Counter("mor_generated_tokens", "Tokens generated.", registry=where)
        self.depths = Counter("mor_tokens_by_depth", "Tokens generated, by passes.", ["depth"], registry=where)
        self.mean_depth = Gauge("mor_mean_depth", "Passes per generated token.", registry=where)
        self.first_token = Histogram(
            "mor_time_to_first_token_seconds", "From arrival to first token.", buckets=_SECONDS, registry=where
        )
        self.token_time = Histogram(
            "mor_time_per_token_seconds",
            "Mean time between the tokens of a completion.",
            buckets=_TOKEN_SECONDS,
            registry=where,
        )
        self.request_time = Histogram(
            "mor_request_seconds", "From arrival to the end of the answer.", buckets=_SECONDS, registry=where
        )
        Gauge("mor_info", "Always 1.", ["model", "version"], registry=where).labels(
            model, installed_versions(("mor-jax",))["mor-jax"]
        ).set(1)
        self._passes = self._tokens = 0

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        return self.reading.collect()

    def count(self, sequence: PromptSequence, update: Update) -> None:
        """Count what a step has generated for a sequence (which has counted it itself)."""
        pieces = update.pieces
        self.tokens.inc(len(pieces))
        for piece in pieces:
            self.depths.labels(str(piece.depth)).inc()
        self._tokens += len(pieces)
        self._passes += sum(piece.depth for piece in pieces)
        self.mean_depth.set(self._passes / max(1, self._tokens))
        if pieces and sequence.count == len(pieces):
            self.first_token.observe(sequence.begin - sequence.job.arrived)
        if update.finish:
            self.completions.labels(update.finish).inc()
            if sequence.count > 1:
                self.token_time.observe((pieces[-1].time - sequence.begin) / (sequence.count - 1))

    def exposition(self) -> bytes:
        """Return the text."""
        return generate_latest(self.registry)

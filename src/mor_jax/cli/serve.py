"""``mor serve CHECKPOINT``: completions over HTTP, many at a time."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import UserError
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.language_model import LanguageModel, load
from mor_jax.infer.paged_attention import DecodeBackend
from mor_jax.infer.replicas import EngineMesh
from mor_jax.serve.server_options import ServeOptions


@dataclass(frozen=True)
class ServeArguments:
    """Arguments of ``mor serve``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, converted weights, or a Hugging Face or official folder."""
    http: Annotated[ServeOptions, tyro.conf.arg(name="")] = field(default_factory=ServeOptions)
    name: str | None = None
    """What clients call the model; None is the folder's name."""
    max_running: int = 8
    """Sequences decoded at the same time, on every copy of the engine (mesh.data)."""
    max_length: int | None = None
    """Tokens of prompt and completion; None is the model's context."""
    block_slots: int | None = None
    """Tokens that one pass over the block computes; None is two thirds of max_running (all for one pass)."""
    exit_slots: int | None = None
    """Tokens that leave and enter together; None is what block_slots leave of max_running (all for one pass)."""
    exit_at: int | None = None
    """Tokens that make an exit step due; None is exit_slots, 1 runs one in every step."""
    steps: int = 16
    """Block passes between two looks of the host: fewer answer sooner, more waste less."""
    prefill_chunk: int = 128
    """Prompt tokens that are read at a time."""
    block_pages: int | None = None
    """Pages of the block's caches; None is enough for every sequence at its longest and deepest."""
    edge_pages: int | None = None
    """Pages of the first and last layers' caches; None likewise."""
    backend: DecodeBackend = "auto"
    """Decode attention."""
    products: DecodeBackend = "auto"
    """Matrix products of decoded tokens, and sampling."""
    cuts: bool = True
    """Whether requests may cut the vocabulary (top_k, top_p); without, they are refused and decoding is a little
    faster."""
    boundaries: tuple[float, ...] | None = None
    """Expert-choice: raw-score boundary of every recursion, as `mor eval --calibrate` prints; None is the model's."""
    mesh: EngineMesh = field(default_factory=EngineMesh)


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal comes."""
    options = parse(ServeArguments, arguments, "serve", "Serve completions over HTTP, in OpenAI's form.")
    try:
        from mor_jax.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"the package {error.name} is missing: pip install 'mor-jax[serve]'") from error
    enable_compilation_cache()
    return serve(lambda: _load(options), options.http)


def _load(options: ServeArguments) -> tuple[LanguageModel, str, EngineOptions]:
    model = load(options.checkpoint, boundaries=options.boundaries, mesh=options.mesh)
    sizes = {f.name for f in dataclasses.fields(EngineOptions)} & {f.name for f in dataclasses.fields(options)}
    chosen = {name: getattr(options, name) for name in sizes}
    chosen["max_length"] = model.config.context_length if options.max_length is None else options.max_length
    return model, options.name or options.checkpoint.resolve().name, EngineOptions(**chosen)

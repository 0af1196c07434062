"""``mor serve CHECKPOINT``: completions over HTTP, many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mor_jax.cli.options import parse, refuse_products
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import UserError
from mor_jax.infer.engine_options import EngineMesh, EngineOptions
from mor_jax.serve.server_options import ServeOptions

if TYPE_CHECKING:
    from mor_jax.infer.language_model import LanguageModel

_NoFlag = (tyro.conf.Fixed, tyro.conf.Suppress)


@dataclass(frozen=True)
class ServedEngine(EngineOptions):
    """Sizes of the engine that ``mor serve`` asks for: the others have no flag."""

    max_length: int | None = None
    """Tokens of prompt and completion; None is the model's context."""
    staged: Annotated[int | None, *_NoFlag] = EngineOptions.staged
    page_size: Annotated[int, *_NoFlag] = EngineOptions.page_size
    prefill_rows: Annotated[int | None, *_NoFlag] = EngineOptions.prefill_rows


@dataclass(frozen=True)
class ServeArguments:
    """Arguments of ``mor serve``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, converted weights, or a Hugging Face or official folder."""
    http: Annotated[ServeOptions, tyro.conf.arg(name="")] = field(default_factory=ServeOptions)
    name: str | None = None
    """What clients call the model; None is the folder's name."""
    engine: Annotated[ServedEngine, tyro.conf.arg(name="")] = field(default_factory=ServedEngine)
    boundaries: tuple[float, ...] | None = None
    """Expert-choice: raw-score boundary of every recursion, as `mor eval --calibrate` prints; None is the model's."""
    mesh: EngineMesh = field(default_factory=EngineMesh)


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal comes."""
    refuse_products(arguments, "--products")
    options = parse(ServeArguments, arguments, "serve", "Serve completions over HTTP, in OpenAI's form.")
    try:
        from mor_jax.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client", "jinja2"):
            raise
        raise UserError(f"the package {error.name} is missing: pip install -e '.[serve]'") from error
    enable_compilation_cache()
    return serve(lambda: _load(options), options.http)


def _load(options: ServeArguments) -> tuple["LanguageModel", str, EngineOptions]:
    from mor_jax.infer.language_model import load

    model = load(options.checkpoint, boundaries=options.boundaries, mesh=options.mesh)
    return model, options.name or options.checkpoint.resolve().name, options.engine

"""``mor inspect RUN [--text TEXT | --file FILE]``: the pictures of a run again, for held-out text or any other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import UserError, require
from mor_jax.paths import to_path


@dataclass(frozen=True)
class InspectArguments:
    """Arguments of ``mor inspect``."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, local or `gs://`."""
    text: str | None = None
    """Text to route instead of the held-out one."""
    file: Path | None = None
    """File with the text to route (UTF-8)."""
    out: Path | None = None
    """Folder for the pictures; None is the run's own, or `inspect` in it when a text is given."""
    analysis: bool = False
    """Analyse the router too: depth by position, frequency, surprisal, word piece and characters; its figures over
    training; what every pass changes. Written to `analysis` in the folder, as JSON, CSV, PNG and SVG."""


def run(arguments: Sequence[str]) -> int:
    """Write the pictures and print their paths."""
    options = parse(InspectArguments, arguments, "inspect", "Make a run's pictures again.")
    require(options.text is None or options.file is None, "--text and --file exclude each other")
    text = options.text if options.file is None else _read(options.file)

    from mor_jax.evaluate.inspect import inspect_run

    enable_compilation_cache()
    run_folder = to_path(options.run)
    for path in inspect_run(run_folder, text=text, output=options.out, analysis=options.analysis):
        print(path)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: not a readable UTF-8 text ({error})") from error

"""``mor convert SOURCE --to mor|hf|official --out DIR``: weights between formats."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import Dtype
from mor_jax.errors import require
from mor_jax.interop.formats import Target

_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of logits, relative to the largest: rounding through the layers."""


@dataclass(frozen=True)
class ConvertArguments:
    """Arguments of ``mor convert``."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder, converted weights, Hugging Face Llama folder, or run folder of the official release."""
    to: Target = "mor"
    """`mor`: weights of this project; `hf`: plain Llama with recursions unrolled; `official`: the PyTorch release."""
    out: Path | None = None
    """Folder to create."""
    tokenizer: Path | None = None
    """tokenizer.json to put beside the weights; None is the source's own, if it has one."""
    dtype: Dtype = "float32"
    """Of the tensors of `hf`."""
    dry_run: bool = False
    """Only print which tensor would hold which parameter."""
    check: bool = False
    """Read the result again and compare its logits with the original's."""


def run(arguments: Sequence[str]) -> int:
    """Convert, and print the folder last."""
    options = parse(ConvertArguments, arguments, "convert", "Convert weights between formats.")
    require(options.dry_run or options.out is not None, "--out is missing: name the folder to create")

    from mor_jax.data.tokenizer import Tokenizer
    from mor_jax.interop import convert
    from mor_jax.interop.sources import open_model

    enable_compilation_cache()
    loaded = open_model(options.source, lazy=True)
    if options.tokenizer is not None:
        loaded = dataclasses.replace(loaded, tokenizer=Tokenizer.load(options.tokenizer))
    mapping = convert.key_map(loaded, options.to)
    if options.dry_run:
        for name, place in mapping:
            print(f"{name}  <-  {place}")
        return 0
    assert options.out is not None
    with _progress("write", len(mapping)) as advance:
        convert.write(loaded, options.to, options.out, dtype=options.dtype, progress=advance)
    if options.check:
        result = convert.check(loaded, options.out)
        print(f"logits differ by at most {result.max_error:.3g}, the largest is {result.scale:.3g}")
        convert.refuse_mismatch(result, _TOLERANCE[options.dtype])
    print(options.out)
    return 0


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[name]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total, name="")
        yield lambda name: bar.update(task, advance=1, name=name)

"""``mor prepare INPUT... --out DIR``: text to packed, shuffled shards."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.config import Packing


@dataclass(frozen=True)
class PrepareArguments:
    """Tokenise, shuffle and pack text into a folder that `--data.source` reads."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text or JSON (.gz, .xz, .zst, .bz2) or parquet files, folders of them, `embedded`, `docs` (`builtin:docs` where a
    folder has the name) or `tfds:NAME`."""
    out: str
    """Folder of the prepared corpus."""
    tokenizer: str = "bpe:8192"
    """`bytes`, `bpe:SIZE` (trained on the train split) or a tokenizer.json."""
    context_length: int = 2048
    """Rows have one token more."""
    packing: Packing = "concat"
    """`concat`: documents joined with end-of-text and cut; `best_fit`: whole documents, padded where nothing fits."""
    seed: int = 0
    """Seed of the document shuffle and of the split."""
    validation: tuple[str, ...] = ()
    """Inputs that are the held-out split, for a split of your own (by book, by site, by date); documents of the others
    with the same text are left out."""
    validation_share: float | None = None
    """Share of the documents that is held out; None is 0.05, or 0 beside --validation."""
    workers: int = 0
    """Processes that tokenise and pack; 0 stays in this one. The result does not depend on it."""


def run(arguments: Sequence[str]) -> int:
    """Prepare a corpus and print its folder last."""
    options = parse(PrepareArguments, arguments, "prepare", "Turn text into packed, shuffled shards.")

    from mor_jax.data.prepare import prepare

    print(prepare(**{**dataclasses.asdict(options), "out": Path(options.out)}))
    return 0

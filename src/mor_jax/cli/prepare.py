"""``mor prepare INPUT... --out DIR``: text to packed, shuffled shards."""

from collections.abc import Sequence

from mor_jax.cli.options import parse
from mor_jax.data.prepare import PrepareArguments
from mor_jax.data.prepare import run as prepare


def run(arguments: Sequence[str]) -> int:
    """Prepare a corpus and print its folder last."""
    options = parse(PrepareArguments, arguments, "prepare", "Turn text into packed, shuffled shards.")
    print(prepare(options))
    return 0

"""``mor bench train|serve|http ...``: what can be measured on the present device, or of a server."""

import importlib
from collections.abc import Sequence

from mor_jax.errors import UserError, suggest

_TARGETS = {"train": "bench_train", "serve": "bench_serve", "http": "bench_http"}
"""What is measured, and the module with ``run(arguments)``."""


def run(arguments: Sequence[str]) -> int:
    """Dispatch to what is measured."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: mor bench {'|'.join(_TARGETS)} ... [--flags]\n\n`mor bench train --help` says more.")
        return 0 if arguments else 2
    target, *rest = arguments
    if target not in _TARGETS:
        raise UserError(f"mor bench measures {', '.join(_TARGETS)}, not {target!r}{suggest(target, _TARGETS)}")
    return importlib.import_module(f"mor_jax.cli.{_TARGETS[target]}").run(rest)

"""``mor train PRESET [--field value ...]``: train, or continue, a run."""

import sys
from collections.abc import Sequence

from mor_jax.cli.options import preset_and_group
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.config import DistributedConfig

_DESCRIPTION = "Train, or continue, a run; the last line printed is its folder."


def run(arguments: Sequence[str]) -> int:
    """Train and print the run folder last."""
    config, place = preset_and_group(arguments, "train", _DESCRIPTION, "distributed", DistributedConfig())

    from mor_jax.interop.uptrain import initial_weights
    from mor_jax.mesh.processes import initialize
    from mor_jax.train.loop import DivergedError, train

    initialize(place)
    enable_compilation_cache()
    try:
        folder = train(config, initial_weights=initial_weights)
    except DivergedError as error:
        print(f"mor train: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0

"""The persistent cache of compiled programs."""

import os
from pathlib import Path


def enable_compilation_cache() -> Path:
    """Keep compiled programs between runs, in the folder named by MOR_CACHE or in ~/.cache/mor_jax."""
    import jax  # here, so that a command can print its help without it

    folder = Path(os.environ.get("MOR_CACHE") or Path.home() / ".cache" / "mor_jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder

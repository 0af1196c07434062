"""Pallas' interpreter for Mosaic GPU kernels."""

from typing import Any

import jax
import pytest


def gpu_interpreter() -> Any:
    """Parameters of the interpreter; None, which compiles them, on a GPU."""
    if jax.default_backend() == "gpu":
        return None
    if jax.__version_info__ < (0, 12):
        pytest.skip("Pallas' GPU interpreter of jax < 0.12 cannot run these kernels; they are lowered in any case")
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not yet exported

    return InterpretGPUParams()

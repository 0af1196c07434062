"""Pallas' Triton backend, which JAX is going to remove: the only module that imports it, and the choice without it."""

from typing import Any

from jax.experimental import pallas as pl

from mor_jax.config import Kernels
from mor_jax.errors import require
from mor_jax.kernels.choice import log_kernel
from mor_jax.mesh.devices import interpret_kernels

try:
    from jax.experimental.pallas import triton as _triton
except ImportError:
    _triton = None

plt: Any = _triton
"""The module ``jax.experimental.pallas.triton``; None where this JAX has none."""
MISSING = "this version of JAX has no Triton backend of Pallas"


def is_available() -> bool:
    """Whether kernels in Triton can be compiled, or interpreted, with this version of JAX."""
    return plt is not None


def require_triton(asked: str) -> None:
    """Refuse an option such as ``perf.fusion='triton'`` where there is no Triton.

    Raises:
        UserError: there is none.
    """
    require(is_available(), f"{asked}: {MISSING}")


def fuses(operation: str, fusion: Kernels) -> bool:
    """Whether ``perf.fusion`` gives an operation its kernel in Triton; logged once.

    `triton` and `mosaic` do: what has no kernel in Mosaic has one in Triton. Where the backend is missing XLA computes
    the operation beside `mosaic`, and `triton` is refused.

    Raises:
        UserError: `triton` where there is none.
    """
    if fusion not in ("triton", "mosaic"):
        return False
    if fusion == "triton":
        require_triton("perf.fusion='triton'")
    log_kernel(operation, "Triton" if is_available() else f"XLA ({MISSING})")
    return is_available()


def call_kernel(
    kernel: Any, name: str, *, warps: int, stages: int = 1, interpret: bool | None = None, **arguments: Any
) -> Any:
    """``pallas_call``, compiled by Triton.

    Args:
        kernel: the kernel's body.
        name: of the compiled kernel.
        warps: per program.
        stages: reads in flight.
        interpret: whether Pallas' interpreter runs it; None is where this process has CPUs only.
        arguments: of ``pallas_call``.
    """
    interpret = interpret_kernels() if interpret is None else interpret
    params = {} if interpret else {"compiler_params": plt.CompilerParams(num_warps=warps, num_stages=stages)}
    return pl.pallas_call(kernel, interpret=interpret, name=name, **params, **arguments)

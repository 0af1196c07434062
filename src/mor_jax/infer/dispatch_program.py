"""A dispatch as its device compiles it best."""

import functools
from typing import Any

import jax

from mor_jax.infer.stages import dispatch

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA chooses between its Triton kernels and cuBLAS by timing each product alone, with weights that lie in the cache,
where a step reads them from memory: at 32 rows it took a kernel of 9.6 us for gate and up on an H200, cuBLAS takes 5.7,
and no kernels that add the parts of a long sum (experiments/serving/README.md)."""


@functools.cache
def dispatch_program(platform: str) -> Any:
    """Return ``stages.dispatch`` for a platform (``target_platform``), jitted likewise."""
    if platform != "gpu":
        return dispatch
    plain: Any = dispatch
    return jax.jit(plain.__wrapped__, static_argnames="shape", donate_argnums=1, compiler_options=GPU_OPTIONS)

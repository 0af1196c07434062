"""A dispatch as its device compiles it best."""

import functools
from typing import Any

import jax

from mor_jax.infer.stages import dispatch

GPU_OPTIONS, GPU_ROWS = {"xla_gpu_enable_triton_gemm": False}, range(16, 65)
"""What a GPU compiles with, and where: 1.04 times the tokens/s with 32 block slots, others are not measured.

XLA chooses between its Triton kernels and cuBLAS by timing each product alone, with weights that lie in the cache,
where a step reads them from memory: at 32 rows it took a kernel of 9.6 us for gate and up on an H200, cuBLAS takes 5.7,
and no kernels that add the parts of a long sum (experiments/serving/README.md)."""


@functools.cache
def dispatch_program(platform: str, block_slots: int) -> Any:
    """Return ``stages.dispatch`` for a platform (``target_platform``) and so many rows, jitted likewise."""
    if platform != "gpu" or block_slots not in GPU_ROWS:
        return dispatch
    plain: Any = dispatch
    return jax.jit(plain.__wrapped__, static_argnames="shape", donate_argnums=1, compiler_options=GPU_OPTIONS)

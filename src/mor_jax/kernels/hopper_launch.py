"""What this project's kernels for Hopper GPUs share (Pallas, Mosaic GPU)."""

from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}
"""By the number of computing warpgroups: registers per thread of those, and of the one that copies."""
COPY_MULTIPLE = 8
"""Lengths of tensors that the copy engine (TMA) reads in tiles are padded to this."""


def tiled_smem(dtype: Any, *shape: int) -> Any:
    """Shared memory of tiles, laid out as wgmma reads them."""
    transforms: Any = plgpu  # their constructors are whole only to Python
    tiles = (transforms.TilingTransform((8, 64)), transforms.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=tiles)


def launch(
    body: Callable[..., None],
    name: str,
    *,
    operands: tuple[Any, ...],
    out: Any,
    scratch: Any,
    programs: int,
    warpgroups: int,
    interpret: Any,
) -> Any:
    """Run a kernel of warpgroups that compute, and one more that copies for them.

    Callers must be jitted, so that the layers of a model share one trace and one lowering: else 32 took 25 s.

    Args:
        body: sees references to operands and results, and ``scratch`` by its names; axes `block` and `wg`.
        name: of the compiled kernel.
        operands: arrays, or trees of them.
        out: shapes and dtypes of the results.
        scratch: by name, shared memory and barriers.
        programs: thread blocks.
        warpgroups: that compute.
        interpret: parameters of Pallas' GPU interpreter, for tests on any device; None compiles.
    """
    body.__name__ = name
    extra = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        grid=(programs,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        **extra,
    )(*operands)

"""What this project's kernels for Hopper GPUs share (Pallas, Mosaic GPU)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}
"""By the number of computing warpgroups: registers per thread of those, and of the one that copies."""


COPY_MULTIPLE = 8
"""Lengths of tensors that the copy engine (TMA) reads in tiles are padded to this."""


def is_hopper() -> bool:
    """Whether this process's device is a Hopper GPU."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return jax.default_backend() == "gpu" and capability.startswith("9.")


def multiprocessors() -> int:
    """Multiprocessors of this process's GPU; of an H100 where there is none."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def tiled_smem(dtype: Any, *shape: int) -> Any:
    """Shared memory of tiles, laid out as wgmma reads them."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def pad_axis(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """Lengthen an axis to a multiple with ``value``; nothing is done to one that is whole."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


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

"""FLOPs of the matrix products in a compiled program, loops multiplied out."""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mor_jax.plan.hlo import Computation, Instruction, Module


@dataclass(frozen=True)
class MatrixFlops:
    """FLOPs of the matrix products of one run of a program; one multiply-add is 2."""

    by_op_name: Counter[str]
    """FLOPs by the place in the traced program that the product comes from."""
    opaque_calls: Counter[str]
    """Custom calls by target, with how often each runs: kernels that may hold products which the text does not show."""

    @property
    def total(self) -> int:
        """All matrix products."""
        return self.by_op_name.total()


def matrix_flops(module: Module) -> MatrixFlops:
    """Count the matrix products that a program executes: dot, convolution and cuBLAS calls.

    Products that XLA turned into multiply and reduce (matrix times vector) are no longer products, and do not count.
    """
    flops, opaque = Counter(), Counter()
    for computation, instruction, times in module.executed():
        if instruction.opcode == "dot":
            contracted = instruction.numbers("lhs_contracting_dims")
            flops[instruction.op_name] += times * _dot_flops(computation, instruction, contracted)
        elif instruction.opcode == "convolution":
            flops[instruction.op_name] += times * _convolution_flops(computation, instruction)
        elif instruction.opcode == "custom-call":
            target = instruction.attribute("custom_call_target") or ""
            dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            if target.startswith("__cublas$") and dims:
                contracted = tuple(int(n) for n in re.findall(r"\d+", dims[1]))
                flops[instruction.op_name] += times * _dot_flops(computation, instruction, contracted)
            else:
                opaque[target] += times
    return MatrixFlops(flops, opaque)


def _dot_flops(computation: Computation, dot: Instruction, contracted: tuple[int, ...]) -> int:
    left = computation.operand(dot, 0)
    return 2 * dot.shapes[0].elements * math.prod(left.sizes[axis] for axis in contracted)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """TPU compilers write most matrix products as convolutions, batch axes as dilated windows that are mostly empty."""
    labels = re.split(r"_|->", convolution.attribute("dim_labels") or "")
    left, output = computation.operand(convolution, 0), convolution.shapes[0]
    lhs = dict(zip(labels[0], left.sizes, strict=True))
    out = dict(zip(labels[2], output.sizes, strict=True))
    window = dict(part.split("=") for part in (convolution.attribute("window") or "").split())
    spatial = [axis for axis in labels[0] if axis.isdigit()]
    products = math.prod(
        _valid_products(lhs[axis], out[axis], {k: v.split("x")[int(axis)] for k, v in window.items()})
        for axis in spatial
    )
    groups = int(convolution.attribute("feature_group_count") or 1) * int(
        convolution.attribute("batch_group_count") or 1
    )
    return 2 * lhs["b"] * lhs["f"] * out["f"] * products // groups


def _valid_products(input_size: int, output_size: int, window: dict[str, str]) -> int:
    """Pairs (output place, window place) of one spatial axis that meet an input element, no padding and no hole."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, hole = int(window.get("stride", "1")), int(window.get("lhs_dilate", "1"))
    places = np.arange(output_size)[:, None] * stride
    offsets = np.arange(int(window.get("size", "1")))[None, :] * int(window.get("rhs_dilate", "1"))
    index = places + offsets - low
    return int(np.sum((index >= 0) & (index <= (input_size - 1) * hole) & (index % hole == 0)))

"""Rotary embedding: plain, and of queries and keys out of their joint projection with the values in Pallas (Triton).

One kernel reads the joint product once and writes rotated queries, rotated keys and values; one reads their three
gradients once and writes the gradient of the joint product. So the projection is one product forward, and one for each
of its gradients backward, with nothing to add, pad or slice around them (what XLA made of it is in
experiments/throughput/LOG.md).

Letters: B rows, C tokens of a row, N query heads, K key/value heads, H head dim, X = (N + 2K) H.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mor_jax.config import Kernels
from mor_jax.kernels.pallas_triton import call_kernel, fuses, plt
from mor_jax.mesh.axes import on_shards

Rotary = tuple[jax.Array, jax.Array]
"""Cosine and sine of the angles, float32 [B or 1, C, 1, H/2] each."""
ROWS = 32
"""Tokens per program."""
HEADS = 5
"""Heads per program, about: whole groups of a key/value head, its queries and its values, at least one."""
WARPS = 4


def rotary_tables(positions_BC: jax.Array, head_dim: int, theta: float) -> Rotary:
    """Cosine and sine of the rotary angles, float32 [B, C, 1, H/2] each, at integer positions."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BC.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_rows(positions_BC: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Cosines above sines of the rotary angles, float32 [B, H, C], at integer positions."""
    cos, sin = (table[:, :, 0].transpose(0, 2, 1) for table in rotary_tables(positions_BC, head_dim, theta))
    return jnp.concatenate([cos, sin], axis=1)


def rotary_of_rows(rows_BHC: jax.Array) -> Rotary:
    """Turn the form that kernels on TPUs take into the other."""
    cos, sin = jnp.split(rows_BHC.transpose(0, 2, 1)[:, :, None], 2, axis=-1)
    return cos, sin


def apply_rotary(x_BCNH: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate the halves of every head (the rotate-half convention of Llama), in float32, back to x's dtype."""
    cos, sin = rotary
    first, second = jnp.split(x_BCNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BCNH.dtype)


def rotates_jointly(fusion: Kernels, head_dim: int) -> bool:
    """Whether queries, keys and values should be one product, for ``split_rotate``; else ``apply_rotary`` does it.

    Args:
        fusion: a resolved ``perf.fusion``.
        head_dim: Triton's blocks are powers of two.
    """
    return head_dim >= 2 and head_dim & (head_dim - 1) == 0 and fuses("split and rotation", fusion)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Heads of a joint projection: queries, then `kv_heads` keys and as many values."""

    heads: int
    kv_heads: int
    rows: int
    groups_per_program: int
    warps: int

    @property
    def parts(self) -> list[tuple[int, int, bool]]:
        """Per output: its heads in a group, its first head in the joint projection, whether it rotates."""
        queries = (self.heads // self.kv_heads, 0, True)
        return [queries, (1, self.heads, True), (1, self.heads + self.kv_heads, False)]


def _layout(heads: int, kv_heads: int) -> _Layout:
    size = (heads + 2 * kv_heads) // kv_heads
    fitting = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0 and count * size <= HEADS]
    return _Layout(heads, kv_heads, ROWS, max(fitting, default=1), WARPS)


def split_rotate(
    joint_BCX: jax.Array, rotary: Rotary, heads: int, kv_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split a joint projection; rotate queries and keys in float32, back to its dtype, as ``apply_rotary`` does.

    Args:
        joint_BCX: [B, C, (N + 2K) H]: queries, keys, values. Every device has all heads of its tokens.
        rotary: cosine and sine, float32 [B or 1, C, 1, H/2]; they get no gradient.
        heads: N, a multiple of K.
        kv_heads: K.

    Returns:
        Queries [B, C, N, H], keys and values [B, C, K, H].
    """
    layout = _layout(heads, kv_heads)

    def local(joint_BCX: jax.Array, rotary: Rotary) -> tuple[jax.Array, ...]:
        split: Any = _split
        cos, sin = (table[:, :, 0] for table in rotary)
        parts = split(layout, joint_BCX, cos, sin)
        return tuple(part.reshape(*part.shape[:2], -1, 2 * cos.shape[-1]) for part in parts)

    joint = ("batch", "sequence", None)
    table = ("batch" if rotary[0].shape[0] == joint_BCX.shape[0] else None, "sequence", None, None)
    each = ("batch", "sequence", None, None)
    return on_shards(local, (joint, (table, table)), (each, each, each))(joint_BCX, rotary)


def _kernel(cos_ref: Any, sin_ref: Any, *refs: Any, layout: _Layout, tokens: int, backward: bool) -> None:
    """Copy heads of a block of tokens between the joint tensor and its parts, rotated; ``backward`` goes back."""
    (*part_refs, joint_ref) = refs if backward else (*refs[1:], refs[0])
    rows, half = cos_ref.shape
    inside = pl.program_id(1) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, half), 0) < tokens
    cos, sin = (plt.load(ref, mask=inside, other=0.0) for ref in (cos_ref, sin_ref))
    sin = -sin if backward else sin

    def load(ref: Any, start: Any) -> list[jax.Array]:
        blocks = [(slice(None), pl.ds(start + offset, half)) for offset in (0, half)]
        return [plt.load(ref.at[block], mask=inside, other=0.0) for block in blocks]

    def store(ref: Any, start: Any, first: jax.Array, second: jax.Array, *, rotates: bool) -> None:
        if rotates:
            first, second = first.astype(jnp.float32), second.astype(jnp.float32)
            first, second = first * cos - second * sin, second * cos + first * sin
        for offset, out in ((0, first), (half, second)):
            plt.store(ref.at[slice(None), pl.ds(start + offset, half)], out.astype(ref.dtype), mask=inside)

    for unit in range(layout.groups_per_program):
        group = pl.program_id(0) * layout.groups_per_program + unit
        moves = []
        for part_ref, (size, first_head, rotates) in zip(part_refs, layout.parts, strict=True):
            for head in (group * size + index for index in range(size)):
                own, joint = (part_ref, head * 2 * half), (joint_ref, (first_head + head) * 2 * half)
                moves.append((own, joint, rotates) if backward else (joint, own, rotates))
        loaded = [load(*source) for source, _, _ in moves]  # all on their way before the first store could hold them up
        for (_, target, rotates), halves in zip(moves, loaded, strict=True):
            store(*target, *halves, rotates=rotates)


def _run(layout: _Layout, inputs: Any, cos: jax.Array, sin: jax.Array, *, backward: bool) -> Any:
    batch, tokens, _ = inputs[0].shape
    half = cos.shape[-1]
    widths = [size * layout.kv_heads * 2 * half for size, *_ in layout.parts]
    parts = [pl.BlockSpec((None, layout.rows, width), lambda _, i, b: (b, i, 0)) for width in widths]
    joint = pl.BlockSpec((None, layout.rows, sum(widths)), lambda _, i, b: (b, i, 0))
    shared = cos.shape[0] == 1
    table = pl.BlockSpec((None, layout.rows, half), lambda _, i, b: (0 if shared else b, i, 0))
    programs = layout.kv_heads // layout.groups_per_program  # the fastest axis: they read the same rows of the tables
    shape = lambda width: jax.ShapeDtypeStruct((batch, tokens, width), inputs[0].dtype)  # noqa: E731
    return call_kernel(
        functools.partial(_kernel, layout=layout, tokens=tokens, backward=backward),
        "mor_split_rotate" + "_gradient" * backward,
        warps=layout.warps,
        grid=(programs, pl.cdiv(tokens, layout.rows), batch),
        in_specs=[table, table, *(parts if backward else [joint])],
        out_specs=[joint] if backward else parts,
        out_shape=[shape(sum(widths))] if backward else [shape(width) for width in widths],
    )(cos, sin, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(layout, joint_BCX, cos, sin):
    return tuple(_run(layout, (joint_BCX,), cos, sin, backward=False))


def _split_forward(layout, joint_BCX, cos, sin):
    return _split(layout, joint_BCX, cos, sin), (cos, sin)


def _split_backward(layout, residuals, grads):
    (grad_BCX,) = _run(layout, grads, *residuals, backward=True)
    return grad_BCX, None, None


_split.defvjp(_split_forward, _split_backward)

"""The three Pallas (Triton) kernels behind ``triton.flash_attention``; letters as there."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mor_jax.kernels.attention.mask import NEVER
from mor_jax.kernels.pallas_triton import plt

_LOG2_E = math.log2(math.e)
_MASKED = -1e30


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch parameters of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of the three kernels; the defaults were the fastest measured on an H100 at head_dim 64."""

    forward: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)
    grad_queries: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)
    grad_keys: Blocks = Blocks(queries=64, keys=64, warps=4, stages=3)

    @property
    def key_multiple(self) -> int:
        """What the number of keys is padded to."""
        return math.lcm(self.forward.keys, self.grad_queries.keys, self.grad_keys.keys)


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """Matrix product in the inputs' dtype, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _rows(ref: Any, index: Any, size: int) -> tuple[Any, ...]:
    """Index of block ``index`` along the first axis."""
    return (pl.ds(index * size, size), *(slice(None),) * (len(ref.shape) - 1))


def _load(ref: Any, inside: Any, other: int = 0) -> jax.Array:
    """Load a block whose rows beyond the array's end read as ``other``; ``inside`` is bool per row, None for all."""
    if inside is None:
        return plt.load(ref)
    mask = jax.lax.broadcast_in_dim(inside, ref.shape, (0,))
    return plt.load(ref, mask=mask, other=other)


def _store(ref: Any, value: jax.Array, inside: Any) -> None:
    mask = None if inside is None else jax.lax.broadcast_in_dim(inside, value.shape, (0,))
    plt.store(ref, value, mask=mask)


def _inside(index: Any, size: int, length: int) -> Any:
    """bool: which rows of block ``index`` exist; None if all of every block do."""
    return None if length % size == 0 else index * size + jax.lax.iota(jnp.int32, size) < length


def _visible(index: Any, size: int, start: Any, end: Any, axis: int) -> jax.Array:
    """bool: which pairs of a tile may meet; keys of block ``index`` along ``axis``, queries along the other."""
    shape = (end.shape[0], size) if axis == 1 else (size, end.shape[0])
    keys = index * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    other = lambda x: jax.lax.broadcast_in_dim(x, shape, (1 - axis,))  # noqa: E731
    mask = keys < other(end)
    return mask if start is None else mask & (keys >= other(start))


def _key_blocks(start: Any, end: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Blocks of keys of a tile of queries: [first, whole) masked, [whole, rest) all visible, [rest, last) masked."""
    last = pl.cdiv(jnp.max(end), size)
    rest = jnp.min(end) // size
    first = whole = jnp.zeros_like(last)
    if start is not None:
        first = jnp.min(start) // size
        whole = pl.cdiv(jnp.max(start), size)
    whole = jnp.minimum(whole, last)
    return first, whole, jnp.maximum(rest, whole), last


def _over_key_blocks(start: Any, end: Any, size: int, step: Any, carry: Any) -> Any:
    first, whole, rest, last = _key_blocks(start, end, size)
    masked = functools.partial(step, masked=True)
    if start is not None:
        carry = jax.lax.fori_loop(first, whole, masked, carry)
    carry = jax.lax.fori_loop(whole, rest, functools.partial(step, masked=False), carry)
    return jax.lax.fori_loop(rest, last, masked, carry)


def forward_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    """Write the output of one block of queries, and the base-2 logarithm of its softmax sums."""
    query_ref, key_ref, value_ref, *ranges, out_ref, lse_ref = refs
    inside = _inside(pl.program_id(0), blocks.queries, length)
    end, start = _load(ranges[-1], inside), _load(ranges[0], inside, NEVER) if has_start else None
    query = _load(query_ref, inside)

    def step(index: Any, carry: Any, *, masked: bool) -> Any:
        top, total, sums = carry
        key, value = (ref[_rows(ref, index, blocks.keys)] for ref in (key_ref, value_ref))
        scores = _dot(query, key, contract=(1, 1)) * (scale * _LOG2_E)
        if masked:
            scores = jnp.where(_visible(index, blocks.keys, start, end, 1), scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        if masked:
            weights = jnp.where(scores > _MASKED / 2, weights, 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums = sums * shrink[:, None] + _dot(weights.astype(value.dtype), value, contract=(1, 0))
        return new_top, total, sums

    count = query.shape[0]
    carry = (jnp.full((count,), _MASKED), jnp.zeros((count,), jnp.float32), jnp.zeros(query.shape, jnp.float32))
    top, total, sums = _over_key_blocks(start, end, blocks.keys, step, carry)
    total = jnp.where(total > 0, total, 1.0)
    _store(out_ref, (sums / total[:, None]).astype(out_ref.dtype), inside)
    _store(lse_ref, top + jnp.log2(total), inside)


def grad_queries_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    """Write the gradient of one block of queries."""
    query_ref, key_ref, value_ref, *ranges, grad_out_ref, lse_ref, delta_ref, grad_ref = refs
    inside = _inside(pl.program_id(0), blocks.queries, length)
    end, start = _load(ranges[-1], inside), _load(ranges[0], inside, NEVER) if has_start else None
    query, grad_out, lse, delta = (_load(ref, inside) for ref in (query_ref, grad_out_ref, lse_ref, delta_ref))

    def step(index: Any, grad: Any, *, masked: bool) -> Any:
        key, value = (ref[_rows(ref, index, blocks.keys)] for ref in (key_ref, value_ref))
        scores = _dot(query, key, contract=(1, 1)) * (scale * _LOG2_E)
        weights = jnp.exp2(scores - lse[:, None])
        if masked:
            weights = jnp.where(_visible(index, blocks.keys, start, end, 1), weights, 0.0)
        grad_weights = _dot(grad_out, value, contract=(1, 1))
        grad_scores = weights * (grad_weights - delta[:, None])
        return grad + _dot(grad_scores.astype(key.dtype), key, contract=(1, 0))

    grad = _over_key_blocks(start, end, blocks.keys, step, jnp.zeros(query.shape, jnp.float32))
    _store(grad_ref, (grad * scale).astype(grad_ref.dtype), inside)


def grad_keys_kernel(*refs: Any, blocks: Blocks, length: int, scale: float, has_start: bool) -> None:
    """Write the gradients of one block of keys and of values."""
    query_ref, key_ref, value_ref, *ranges, grad_out_ref, lse_ref, delta_ref, span_ref = refs[:-2]
    grad_key_ref, grad_value_ref = refs[-2:]
    block = pl.program_id(0)
    key, value = key_ref[...], value_ref[...]
    groups = query_ref.shape[1]

    def step(index: Any, carry: Any, *, group: Any) -> Any:
        grad_key, grad_value = carry
        rows, inside = pl.ds(index * blocks.queries, blocks.queries), _inside(index, blocks.queries, length)
        query, grad_out = (_load(ref.at[rows, group, :], inside) for ref in (query_ref, grad_out_ref))
        lse, delta = (_load(ref.at[group, rows], inside) for ref in (lse_ref, delta_ref))
        end = _load(ranges[-1].at[rows], inside)
        start = _load(ranges[0].at[rows], inside, NEVER) if has_start else None
        scores = _dot(key, query, contract=(1, 1)) * (scale * _LOG2_E)
        weights = jnp.exp2(scores - lse[None, :])
        weights = jnp.where(_visible(block, blocks.keys, start, end, 0), weights, 0.0)
        grad_value += _dot(weights.astype(value.dtype), grad_out, contract=(1, 0))
        grad_weights = _dot(value, grad_out, contract=(1, 1))
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key += _dot(grad_scores.astype(query.dtype), query, contract=(1, 0))
        return grad_key, grad_value

    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    first, last = span_ref[0], span_ref[1]
    for group in range(groups):
        # a number that is traced: masked loads in interpret mode take no other
        traced = jax.lax.convert_element_type(block * 0 + group, jnp.int32)
        carry = jax.lax.fori_loop(first, last, functools.partial(step, group=traced), carry)
    grad_key, grad_value = carry
    grad_key_ref[...] = (grad_key * scale).astype(grad_key_ref.dtype)
    grad_value_ref[...] = grad_value.astype(grad_value_ref.dtype)

"""The pieces of a training step that ``kernels.py`` times: what computed each before, and what does now.

Letters: B rows, C tokens of a row, D model, N query heads, K key/value heads, H head dim, X = (N + 2K) H.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.kernels import norm, rotary, swiglu_hopper
from mor_jax.kernels.attention import hopper as attention_hopper
from mor_jax.kernels.attention import triton as attention_gpu
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.norm import rms_norm, skip_norm
from mor_jax.kernels.rotary import apply_rotary, rotary_tables, split_rotate
from mor_jax.kernels.swiglu import swiglu
from mor_jax.model.attention import project_qkv
from mor_jax.model.layers import compute_weight

_EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of the pieces."""

    rows: int = 16
    tokens: int = 2048
    selected: int = 1368
    """Tokens of a row in the second recursion."""
    width: int = 960
    ffn: int = 2560
    heads: int = 15
    kv_heads: int = 5
    head_dim: int = 64
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    variants: Mapping[str, Callable[..., Any]]
    """What computes it, by name, the oldest first; the others' speed-ups are over that one."""
    arguments: tuple[Any, ...]
    least_bytes: int | None = None
    """Traffic if every input is read and every output written once: for pieces that the memory's speed limits."""


def _normal(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _inputs(shape: Shape, tokens: int) -> tuple[jax.Array, ...]:
    """Hidden states, scale, both weights (normal with deviation 0.02), cosine and sine."""
    width, head_dim, dtype = shape.width, shape.head_dim, shape.dtype
    positions_BC = jnp.tile(jnp.arange(tokens, dtype=jnp.int32)[None], (shape.rows, 1))
    return (
        _normal(0, shape.rows, tokens, width, dtype=dtype),
        jnp.ones(width),
        0.02 * _normal(1, width, shape.heads, head_dim, dtype=dtype),
        0.02 * _normal(2, width, 2, shape.kv_heads, head_dim, dtype=dtype),
        *rotary_tables(positions_BC, head_dim, 10_000.0),
    )


def _with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Outputs and the gradients of the first ``count`` arguments, for the cotangents that come last."""

    def run(*arguments: Any) -> Any:
        *inputs, grads = arguments
        out, pull = jax.vjp(lambda *first: function(*first, *inputs[count:]), *inputs[:count])
        return out, pull(grads)

    return run


def _cotangents(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda a: _normal(3, *a.shape, dtype=a.dtype), shapes)


def _skip_norm(shape: Shape) -> Case:
    """The norm at the start of a layer, forward."""
    x_BCD, scale_D, *_ = _inputs(shape, shape.tokens)
    variants = {
        "xla": lambda x_BCD, scale_D: rms_norm(x_BCD, scale_D, _EPSILON),
        "kernel": lambda x_BCD, scale_D: skip_norm(x_BCD, scale_D, _EPSILON)[1],
    }
    return Case(variants, (x_BCD, scale_D), 2 * x_BCD.nbytes)


def _norm_gradient(shape: Shape, tokens: int) -> Case:
    """The gradients of the residual stream's two uses, added, and of the scale."""
    x_BCD, scale_D, *_ = _inputs(shape, tokens)
    grads = (_normal(5, *x_BCD.shape, dtype=shape.dtype), _normal(6, *x_BCD.shape, dtype=shape.dtype))

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x_BCD, scale_D, grads: jax.vjp(function, x_BCD, scale_D)[1](grads)

    variants = {
        "xla": gradient(lambda x_BCD, scale_D: (x_BCD, rms_norm(x_BCD, scale_D, _EPSILON))),
        "kernel": gradient(lambda x_BCD, scale_D: skip_norm(x_BCD, scale_D, _EPSILON)),
    }
    return Case(variants, (x_BCD, scale_D, grads), 4 * x_BCD.nbytes)


def _split_rotate(shape: Shape, *, backward: bool) -> Case:
    """The joint product to rotated queries, rotated keys, and values; or their gradients back."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    *_, cos, sin = _inputs(shape, shape.tokens)
    joint_BCX = _normal(4, shape.rows, shape.tokens, (heads + 2 * kv_heads) * head_dim, dtype=shape.dtype)

    def plain(joint_BCX: jax.Array, *rotary: jax.Array) -> Any:
        joint_BCMH = joint_BCX.reshape(*joint_BCX.shape[:2], -1, head_dim)
        query, key, value = jnp.split(joint_BCMH, [heads, heads + kv_heads], axis=2)
        return apply_rotary(query, (rotary[0], rotary[1])), apply_rotary(key, (rotary[0], rotary[1])), value

    def kernel(joint_BCX: jax.Array, *rotary: jax.Array) -> Any:
        return split_rotate(joint_BCX, (rotary[0], rotary[1]), heads, kv_heads)

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda joint, cos, sin, grads: jax.vjp(lambda x: function(x, cos, sin), joint)[1](grads)

    least_bytes = 2 * joint_BCX.nbytes + cos.nbytes + sin.nbytes
    arguments = (joint_BCX, cos, sin)
    if not backward:
        return Case({"xla": plain, "kernel": kernel}, arguments, least_bytes)
    arguments = (*arguments, _cotangents(plain, arguments))
    return Case({"xla": gradient(plain), "kernel": gradient(kernel)}, arguments, least_bytes)


def _projection(shape: Shape, tokens: int) -> Case:
    """Norm (the kernel), rotated queries, rotated keys and values, with gradients of input, scale and weights."""

    def separate(x_BCD: Any, scale_D: Any, query: Any, key_value: Any, cos: Any, sin: Any) -> Any:
        x_BCD, normed_BCD = skip_norm(x_BCD, scale_D, _EPSILON)
        query, key_value = compute_weight(query), compute_weight(key_value)
        rotated = apply_rotary(jnp.einsum("BCD,DNH->BCNH", normed_BCD, query), (cos, sin))
        both = jnp.einsum("BCD,DXKH->BCXKH", normed_BCD, key_value)
        return x_BCD, (rotated, (apply_rotary(both[:, :, 0], (cos, sin)), both[:, :, 1]))

    def joint(x_BCD: Any, scale_D: Any, query: Any, key_value: Any, cos: Any, sin: Any) -> Any:
        x_BCD, normed_BCD = skip_norm(x_BCD, scale_D, _EPSILON)
        return x_BCD, project_qkv(normed_BCD, query, key_value, (cos, sin))

    arguments = _inputs(shape, tokens)
    grads = _cotangents(separate, arguments)
    variants = {name: _with_gradients(f, 4) for name, f in {"separate": separate, "joint": joint}.items()}
    return Case(variants, (*arguments, grads))


def _attention(shape: Shape, kind: str, *, backward: bool) -> Case:
    """Attention alone; with ``backward`` also the gradients of queries, keys and values.

    Args:
        shape: sizes.
        kind: `causal`, `selected` (causal among the selected tokens), `shared` (selected queries over all keys) or
            `packed` (a quarter of the rows, four times as long, of documents that end at random).
        backward: whether to time the gradients, too.
    """
    rows, keys, queries = shape.rows, shape.tokens, shape.tokens
    if kind in ("selected", "shared"):
        queries = shape.selected
        keys = queries if kind == "selected" else keys
    if kind == "packed":
        rows, keys, queries = rows // 4, keys * 4, queries * 4
    tensors = [
        _normal(seed, rows, length, heads, shape.head_dim, dtype=shape.dtype)
        for seed, (length, heads) in enumerate([(queries, shape.heads), (keys, shape.kv_heads), (keys, shape.kv_heads)])
    ]
    start: Any = None
    end: Any = None
    if kind == "shared":
        order = jnp.argsort(jax.random.uniform(jax.random.key(5), (rows, keys)), axis=1)[:, :queries]
        end = jnp.sort(order, axis=1).astype(jnp.int32) + 1
    if kind == "packed":
        ends = jax.random.bernoulli(jax.random.key(5), 1 / 512, (rows, keys))
        index_BT = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (rows, keys))
        start, end = Mask(TokenView(index_BT, index_BT, jnp.cumsum(ends, axis=1).astype(jnp.int32))).runs()

    def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    def triton(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention_gpu.flash_attention(query, key, value, start, end)

    def mosaic(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention_hopper.flash_attention(query, key, value, start, end)

    variants = {"cudnn": cudnn} if end is None else {"triton": triton}
    variants["mosaic"] = mosaic
    if backward:
        grads = _cotangents(mosaic, tuple(tensors))
        return Case({name: _with_gradients(f, 3) for name, f in variants.items()}, (*tensors, grads))
    return Case(variants, tuple(tensors))


def _feed_forward(shape: Shape, tokens: int, *, backward: bool) -> Case:
    """The gated feed-forward; with ``backward`` also the gradients of input and weights."""
    width, ffn, dtype = shape.width, shape.ffn, shape.dtype
    arguments = (
        _normal(0, shape.rows, tokens, width, dtype=dtype),
        0.02 * _normal(1, width, 2, ffn, dtype=dtype),
        0.02 * _normal(2, ffn, width, dtype=dtype),
    )

    def separate(x_BCD: jax.Array, gate_up_DXF: jax.Array, down_FD: jax.Array) -> jax.Array:
        hidden_BCXF = jnp.einsum("BCD,DXF->BCXF", x_BCD, gate_up_DXF)
        return jnp.einsum("BCF,FD->BCD", swiglu(hidden_BCXF), down_FD)

    variants: dict[str, Callable[..., Any]] = {"separate": separate, "within": swiglu_hopper.feed_forward}
    if not backward:
        return Case(variants, arguments)
    grads = _cotangents(separate, arguments)
    return Case({name: _with_gradients(f, 3) for name, f in variants.items()}, (*arguments, grads))


CASES: dict[str, Callable[[Shape], Case]] = {
    "skip_norm": _skip_norm,
    "norm_gradient": lambda shape: _norm_gradient(shape, shape.tokens),
    "norm_gradient_selected": lambda shape: _norm_gradient(shape, shape.selected),
    "split_rotate": lambda shape: _split_rotate(shape, backward=False),
    "split_rotate_gradient": lambda shape: _split_rotate(shape, backward=True),
    "projection": lambda shape: _projection(shape, shape.tokens),
    "projection_selected": lambda shape: _projection(shape, shape.selected),
    "feed_forward": lambda shape: _feed_forward(shape, shape.tokens, backward=False),
    "feed_forward_gradient": lambda shape: _feed_forward(shape, shape.tokens, backward=True),
    "feed_forward_gradient_selected": lambda shape: _feed_forward(shape, shape.selected, backward=True),
    **{
        f"attention_{kind}{'_gradient' if backward else ''}": functools.partial(
            _attention, kind=kind, backward=backward
        )
        for kind in ("causal", "selected", "shared", "packed")
        for backward in (False, True)
    },
}
"""The pieces, by name."""

_NORM_SIZES = (norm, {"GRAD_ROWS": (1, 2, 4), "GRAD_CHUNK": (16, 32, 48, 64), "GRAD_WARPS": (2, 4, 8)})
_ROTARY_SIZES = (rotary, {"ROWS": (8, 16, 32, 64), "HEADS": (5, 25), "WARPS": (2, 4, 8)})
TUNABLE: dict[str, tuple[ModuleType, Mapping[str, tuple[int, ...]]]] = {
    "skip_norm": (norm, {"ROWS": (1, 2, 4, 8), "WARPS": (2, 4, 8)}),
    "norm_gradient": _NORM_SIZES,
    "norm_gradient_selected": _NORM_SIZES,
    "split_rotate": _ROTARY_SIZES,
    "split_rotate_gradient": _ROTARY_SIZES,
}
"""Module constants of a piece's last variant, and values to try."""

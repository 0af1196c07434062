"""The bodies of the attention kernels for TPUs: forward, and all gradients in one (letters as in ``tpu``).

Everything is held transposed, tokens along the lanes: heads are then rows of a tile (a slice of them costs nothing,
whatever their number and width), the rotary halves are rows, too, and what a query has one of (run, maximum, sum) is
one row, which broadcasts and is reduced into without crossing lanes. Scores are [keys, queries].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LOG2E = 1.4426950408889634
"""Powers are taken of two; the factor is in the queries' scale."""
_LOW = -1e30
"""Score of a hidden key; finite, so that queries without any key stay finite."""
_FIRST, _PAST, _FULL, _FULL_PAST = range(4)
"""Of ``blocks``: blocks of keys from first to past are visited; those from full to full past need no mask."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of a call."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    block_q: int
    block_k: int
    unit: int
    """Key/value heads of a program, with the query heads of their groups."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def blocks_q(self) -> int:
        """Blocks of queries."""
        return pl.cdiv(self.queries, self.block_q)

    @property
    def blocks_k(self) -> int:
        """Blocks of keys."""
        return pl.cdiv(self.keys, self.block_k)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of matrices, float32 in full where they are float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _dot_turned(a_XT: jax.Array, b_ST: jax.Array) -> jax.Array:
    """Product of a matrix and the transpose of another, which the matrix unit transposes as it loads it."""
    precision = lax.Precision.HIGHEST if a_XT.dtype == jnp.float32 else None
    contracted = (((1,), (1,)), ((), ()))
    return lax.dot_general(a_XT, b_ST, contracted, precision=precision, preferred_element_type=jnp.float32)


def _rotated(x_HT: jax.Array, table_HT: jax.Array | None, *, back: bool = False) -> jax.Array:
    """Rotate the halves of a head, or turn them back; the table holds cosines above sines."""
    if table_HT is None:
        return x_HT
    half = x_HT.shape[0] // 2
    first, second, cos, sin = x_HT[:half], x_HT[half:], table_HT[:half], table_HT[half:]
    sin = -sin if back else sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=0)


def _turned(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).T


def _within(x_XT: jax.Array, block: Any, length: int, axis: int) -> jax.Array:
    """Zeros beyond the end of a length: what a block reads there is anything."""
    size = x_XT.shape[axis]
    if length % size == 0:
        return x_XT
    index = lax.broadcasted_iota(jnp.int32, x_XT.shape, axis) + block * size
    return jnp.where(index < length, x_XT, 0)


def _heads(layout: Layout, unit: Any) -> Any:
    """Query heads of a program; the last one has fewer where the units don't divide the heads."""
    return jnp.minimum(layout.unit, layout.kv_heads - unit * layout.unit) * layout.group


def _table(ref: Any, block: Any, size: int) -> jax.Array | None:
    return None if ref is None else ref[0, :, pl.ds(pl.multiple_of(block * size, size), size)]


def _mask(layout: Layout, runs_2T: jax.Array, valid: Any, j: Any) -> jax.Array:
    """bool [keys, queries] of a block of keys."""
    shape = (layout.block_k, layout.block_q)
    key = lax.broadcasted_iota(jnp.int32, shape, 0) + j * layout.block_k
    seen = (key >= runs_2T[0:1]) & (key < runs_2T[1:2])
    return seen if valid is None else seen & (jnp.broadcast_to(valid[j][:, 0:1], shape) > 0)


def _visit(blocks: Any, at: Any, step: Callable[..., Any], carry: Any) -> Any:
    """Walk over a block of queries' blocks of keys: first those that need a mask, before and after, then the others."""
    first, past, full, full_past = (blocks[at * 4 + index] for index in (_FIRST, _PAST, _FULL, _FULL_PAST))
    before = full - first

    def masked(index: Any, carry: Any) -> Any:
        return step(jnp.where(index < before, first + index, full_past + index - before), carry, masked=True)

    carry = lax.fori_loop(0, before + past - full_past, masked, carry)
    return lax.fori_loop(full, full_past, lambda j, carry: step(j, carry, masked=False), carry)


def _prepare_keys(layout: Layout, table: Any, k_ref: Any, v_ref: Any, valid: Any, places: dict[str, Any]) -> None:
    """Rotate a row's keys, and lay keys and values out by heads and blocks as the products read them."""
    size, width = layout.block_k, layout.head_dim

    def one(j: Any, _: Any) -> Any:
        rows = pl.ds(pl.multiple_of(j * size, size), size)
        k_XS, v_XS = (_within(_turned(ref[0, rows, :]), j, layout.keys, 1) for ref in (k_ref, v_ref))
        table_HS = _table(table, j, size)
        for head in range(layout.unit):
            own = slice(head * width, (head + 1) * width)
            k_HS = _within(_rotated(k_XS[own], table_HS), j, layout.keys, 1)
            found = {"k": k_HS.T, "kT": k_HS, "v": v_XS[own].T, "vT": v_XS[own]}
            for name, ref in places.items():
                ref[head, j] = found[name].astype(ref.dtype)
        if valid is not None:
            ref, valid_s = valid
            valid_s[j] = jnp.broadcast_to(ref[0, :, rows], (128, size)).T
        return 0

    lax.fori_loop(0, layout.blocks_k, one, 0)


def _prepare_queries(layout: Layout, table: Any, q_ref: Any, i: Any) -> list[jax.Array]:
    """Rotated and scaled queries, float32 [H, queries] per head."""
    width = layout.head_dim
    q_XT = _turned(q_ref[0])
    table_HT, scale = None if table is None else table[0], width**-0.5 * LOG2E
    heads = (q_XT[n * width : (n + 1) * width] for n in range(layout.unit * layout.group))
    return [_within(_rotated(q_HT * scale, table_HT), i, layout.queries, 1) for q_HT in heads]


def forward_kernel(layout: Layout, blocks: Any, refs: dict[str, Any]) -> None:
    """Attention of a block of queries, and log2 of the sum of the powers of their scores."""
    b, unit, i = (pl.program_id(axis) for axis in range(3))
    width, block_q = layout.head_dim, layout.block_q
    valid = refs.get("valid_s")

    @pl.when(i == 0)
    def _row() -> None:
        validity = None if valid is None else (refs["valid"], valid)
        places = {"k": refs["k_s"], "vT": refs["vT_s"]}
        _prepare_keys(layout, refs.get("table_k"), refs["k"], refs["v"], validity, places)

    qT_s, oT_s = refs["qT_s"], refs["oT_s"]
    for n, q_HT in enumerate(_prepare_queries(layout, refs.get("table_q"), refs["q"], i)):
        qT_s[n] = q_HT.astype(qT_s.dtype)
    runs_2T = refs["runs"][0]

    def head(n: Any, _: Any) -> Any:
        group, q_HT = lax.div(n, jnp.int32(layout.group)), qT_s[n]

        def step(j: Any, carry: Any, *, masked: bool) -> Any:
            top, total, out_HT = carry
            scores = _dot(refs["k_s"][group, j], q_HT)
            if masked:
                scores = jnp.where(_mask(layout, runs_2T, valid, j), scores, _LOW)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
            powers, shrink = jnp.exp2(scores - new_top), jnp.exp2(top - new_top)
            total = total * shrink + jnp.sum(powers, axis=0, keepdims=True)
            vT = refs["vT_s"][group, j]
            return new_top, total, out_HT * shrink + _dot(vT, powers.astype(vT.dtype))

        row = lambda value: jnp.full((1, block_q), value, jnp.float32)  # noqa: E731
        start = (row(_LOW), row(0), jnp.zeros((width, block_q), jnp.float32))
        top, total, out_HT = _visit(blocks, b * layout.blocks_q + i, step, start)
        oT_s[pl.ds(pl.multiple_of(n * width, width), width), :] = out_HT / total
        refs["lse"][0, 0, pl.ds(n, 1), :] = top + jnp.log2(total)
        return 0

    lax.fori_loop(0, _heads(layout, unit), head, 0)
    refs["o"][0] = oT_s[...].T.astype(refs["o"].dtype)


def backward_kernel(layout: Layout, blocks: Any, refs: dict[str, Any]) -> None:
    """Gradients of a block of queries, and of a row's keys and values, which are summed over its blocks of queries."""
    b, unit, i = (pl.program_id(axis) for axis in range(3))
    width, block_q, block_k = layout.head_dim, layout.block_q, layout.block_k
    valid, dtype = refs.get("valid_s"), refs["q"].dtype
    names = ("k_s", "kT_s", "v_s", "qT_s", "gT_s", "delta_s", "dqT_s", "dkT_s", "dvT_s")
    k_s, kT_s, v_s, qT_s, gT_s, delta_s, dqT_s, dkT_s, dvT_s = (refs[name] for name in names)

    @pl.when(i == 0)
    def _row() -> None:
        validity = None if valid is None else (refs["valid"], valid)
        places = {"k": k_s, "kT": kT_s, "v": v_s}
        _prepare_keys(layout, refs.get("table_k"), refs["k"], refs["v"], validity, places)
        dkT_s[...], dvT_s[...] = (jnp.zeros(dkT_s.shape, jnp.float32),) * 2

    g_XT, o_XT = (_within(_turned(refs[name][0]), i, layout.queries, 1) for name in ("g", "o"))
    for n, q_HT in enumerate(_prepare_queries(layout, refs.get("table_q"), refs["q"], i)):
        own = slice(n * width, (n + 1) * width)
        qT_s[n], gT_s[n] = q_HT.astype(dtype), g_XT[own].astype(dtype)
        delta_s[n] = jnp.sum(g_XT[own] * o_XT[own], axis=0, keepdims=True)
    runs_2T = refs["runs"][0]

    def head(n: Any, _: Any) -> Any:
        group = lax.div(n, jnp.int32(layout.group))
        q_HT, g_HT = qT_s[n], gT_s[n]
        lse_1T, delta_1T = refs["lse"][0, 0, pl.ds(n, 1), :], delta_s[n]

        def step(j: Any, dq_HT: Any, *, masked: bool) -> Any:
            powers = jnp.exp2(_dot(k_s[group, j], q_HT) - lse_1T)
            if masked:
                powers = jnp.where(_mask(layout, runs_2T, valid, j), powers, 0)
            dvT_s[group, j] += _dot_turned(g_HT, powers.astype(dtype))
            grads = (powers * (_dot(v_s[group, j], g_HT) - delta_1T)).astype(dtype)
            dkT_s[group, j] += _dot_turned(q_HT, grads)
            return dq_HT + _dot(kT_s[group, j], grads)

        dq_HT = _visit(blocks, b * layout.blocks_q + i, step, jnp.zeros((width, block_q), jnp.float32))
        table_HT = None if refs.get("table_q") is None else refs["table_q"][0]
        dqT_s[pl.ds(pl.multiple_of(n * width, width), width), :] = _rotated(dq_HT * width**-0.5, table_HT, back=True)
        return 0

    lax.fori_loop(0, _heads(layout, unit), head, 0)
    refs["dq"][0] = dqT_s[...].T.astype(refs["dq"].dtype)

    @pl.when(i == layout.blocks_q - 1)
    def _sums() -> None:
        def one(j: Any, _: Any) -> Any:
            rows = pl.ds(pl.multiple_of(j * block_k, block_k), block_k)
            table_HS = _table(refs.get("table_k"), j, block_k)
            dk = [_rotated(dkT_s[head, j] * (1 / LOG2E), table_HS, back=True) for head in range(layout.unit)]
            dv = [dvT_s[head, j] for head in range(layout.unit)]
            for name, found in (("dk", dk), ("dv", dv)):
                refs[name][0, rows, :] = jnp.concatenate(found, axis=0).T.astype(refs[name].dtype)
            return 0

        lax.fori_loop(0, layout.blocks_k, one, 0)

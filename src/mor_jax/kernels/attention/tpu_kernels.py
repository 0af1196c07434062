"""The bodies of the attention kernels for TPUs: forward, and all gradients in one (letters as in ``tpu``).

Tokens are along the lanes: heads are then rows of a tile (a slice of them costs nothing, whatever their number and
width), the rotary halves are rows, too, and what a query has one of (run, maximum, sum) is one row, which broadcasts
and is reduced into without crossing lanes. Scores are [keys, queries].
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
    """Key/value heads of a program, with the query heads of their groups; divides them all."""

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


def _within(x_XT: jax.Array, block: Any, length: int) -> jax.Array:
    """Zeros beyond the end of a length: what a block reads there is anything."""
    size = x_XT.shape[1]
    if length % size == 0:
        return x_XT
    index = lax.broadcasted_iota(jnp.int32, x_XT.shape, 1) + block * size
    return jnp.where(index < length, x_XT, 0)


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


def _rows(index: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(index * size, size), size)


def _prepare_keys(layout: Layout, table: Any, k_ref: Any, v_ref: Any, valid: Any, places: dict[str, Any]) -> None:
    """Rotate a row's keys, and lay keys and values out by heads and blocks as the products read them."""
    size, width = layout.block_k, layout.head_dim

    def one(j: Any, _: Any) -> Any:
        tokens = _rows(j, size)
        table_HS = _table(table, j, size)
        for head in range(layout.unit):
            own = slice(head * width, (head + 1) * width)
            k_HS, v_HS = (_within(ref[0, own, tokens].astype(jnp.float32), j, layout.keys) for ref in (k_ref, v_ref))
            k_HS = _within(_rotated(k_HS, table_HS), j, layout.keys)
            for name, ref in places.items():
                found = k_HS if name[0] == "k" else v_HS
                ref[head, j] = (found if "T" in name else found.T).astype(ref.dtype)
        if valid is not None:
            ref, valid_s = valid
            valid_s[j] = jnp.broadcast_to(ref[0, :, tokens], (128, size)).T
        return 0

    lax.fori_loop(0, layout.blocks_k, one, 0)


def _query(layout: Layout, refs: dict[str, Any], n: Any, i: Any) -> jax.Array:
    """Rotated and scaled queries of a head, [H, queries]."""
    ref, table = refs["q"], refs.get("table_q")
    q_HT = ref[0, _rows(n, layout.head_dim), :].astype(jnp.float32) * (layout.head_dim**-0.5 * LOG2E)
    return _within(_rotated(q_HT, None if table is None else table[0]), i, layout.queries).astype(ref.dtype)


def forward_kernel(layout: Layout, blocks: Any, refs: dict[str, Any]) -> None:
    """Attention of a block of queries, and log2 of the sum of the powers of their scores."""
    b, i = pl.program_id(0), pl.program_id(2)
    width, block_q = layout.head_dim, layout.block_q
    valid = refs.get("valid_s")

    @pl.when(i == 0)
    def _row() -> None:
        validity = None if valid is None else (refs["valid"], valid)
        places = {"k": refs["k_s"], "vT": refs["vT_s"]}
        _prepare_keys(layout, refs.get("table_k"), refs["k"], refs["v"], validity, places)

    runs_2T = refs["runs"][0]

    def head(n: Any, _: Any) -> Any:
        group, q_HT = lax.div(n, jnp.int32(layout.group)), _query(layout, refs, n, i)

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
        refs["o"][0, _rows(n, width), :] = (out_HT / total).astype(refs["o"].dtype)
        refs["lse"][0, 0, pl.ds(n, 1), :] = top + jnp.log2(total)
        return 0

    lax.fori_loop(0, layout.unit * layout.group, head, 0)


def backward_kernel(layout: Layout, blocks: Any, refs: dict[str, Any]) -> None:
    """Gradients of a block of queries, and of a row's keys and values, which are summed over its blocks of queries."""
    b, i = pl.program_id(0), pl.program_id(2)
    width, block_q, block_k = layout.head_dim, layout.block_q, layout.block_k
    valid, dtype = refs.get("valid_s"), refs["q"].dtype
    k_s, kT_s, v_s, dkT_s, dvT_s = (refs[name] for name in ("k_s", "kT_s", "v_s", "dkT_s", "dvT_s"))

    @pl.when(i == 0)
    def _row() -> None:
        validity = None if valid is None else (refs["valid"], valid)
        places = {"k": k_s, "kT": kT_s, "v": v_s}
        _prepare_keys(layout, refs.get("table_k"), refs["k"], refs["v"], validity, places)
        dkT_s[...], dvT_s[...] = (jnp.zeros(dkT_s.shape, jnp.float32),) * 2

    runs_2T = refs["runs"][0]

    def head(n: Any, _: Any) -> Any:
        group, own = lax.div(n, jnp.int32(layout.group)), _rows(n, width)
        q_HT = _query(layout, refs, n, i)
        g_HT, o_HT = (_within(refs[name][0, own, :].astype(jnp.float32), i, layout.queries) for name in ("g", "o"))
        lse_1T, delta_1T = refs["lse"][0, 0, pl.ds(n, 1), :], jnp.sum(g_HT * o_HT, axis=0, keepdims=True)
        g_HT = g_HT.astype(dtype)

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
        refs["dq"][0, own, :] = _rotated(dq_HT * width**-0.5, table_HT, back=True).astype(dtype)
        return 0

    lax.fori_loop(0, layout.unit * layout.group, head, 0)

    @pl.when(i == layout.blocks_q - 1)
    def _sums() -> None:
        def one(j: Any, _: Any) -> Any:
            tokens, table_HS = _rows(j, block_k), _table(refs.get("table_k"), j, block_k)
            for head in range(layout.unit):
                own = slice(head * width, (head + 1) * width)
                dk_HS = _rotated(dkT_s[head, j] * (1 / LOG2E), table_HS, back=True)
                refs["dk"][0, own, tokens] = dk_HS.astype(dtype)
                refs["dv"][0, own, tokens] = dvT_s[head, j].astype(dtype)
            return 0

        lax.fori_loop(0, layout.blocks_k, one, 0)

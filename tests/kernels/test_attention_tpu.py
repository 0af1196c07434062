"""The TPU kernels in the interpreter against the plain path, what they skip, where they are refused, and compiled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mor_jax.config import PLAIN, ModelConfig
from mor_jax.errors import UserError
from mor_jax.kernels.attention import backend as attention_backend
from mor_jax.kernels.attention import tpu
from mor_jax.kernels.attention.backend import attend, resolve_backend, resolve_tpu_backend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.attention.tpu import (
    attention_on_shards,
    block_size,
    flash_attention,
    key_part,
    make_layout,
    visited_blocks,
)
from mor_jax.kernels.rotary import apply_rotary, rotary_of_rows, rotary_rows
from mor_jax.mesh.mesh import MESH_AXES
from mor_jax.model import attention as attention_module
from mor_jax.model.attention import Attention
from mor_jax.model.layer_context import take_tokens
from mor_jax.model.recurse import make_context
from mor_jax.model.routing.select import select_mask
from mor_jax.plan.topology import GENERATIONS, describe_topology


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    interpreted = functools.partial(attention_on_shards, interpret=True)
    monkeypatch.setattr(attention_backend, "attention_on_shards", interpreted)


def _view(keys: int, documents: bool = False, valid: bool = False) -> TokenView:
    """Two rows; documents, whose positions restart, end at other places in each."""
    rows_BT = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32)[None], (2, keys))
    lengths_B1 = jnp.array([[keys // 3], [keys - 20]])
    segments_BT = 1 + rows_BT // lengths_B1 if documents else None
    valid_BT = jax.random.bernoulli(jax.random.key(7), 0.7, (2, keys)).at[:, 0].set(True) if valid else None
    return TokenView(rows_BT, rows_BT % lengths_B1 if documents else rows_BT, segments_BT, valid_BT)


def _selected(view: TokenView, queries: int) -> TokenView:
    """Sorted random rows, and two empty seats at the end that hold rows out of order."""
    keys = view.rows_BC.shape[1]
    index_BC = jnp.stack([jax.random.permutation(key, keys)[:queries] for key in jax.random.split(jax.random.key(3))])
    index_BC = jnp.sort(index_BC, axis=1).at[:, -2:].set(5)
    take = lambda x_BT: jnp.take_along_axis(x_BT, index_BC, axis=1)  # noqa: E731
    return dataclasses.replace(jax.tree.map(take, view), valid_BC=None)


def _run(backend: Any, mask: Mask, heads: int, kv_heads: int, width: int):
    """(output, gradients of queries, keys and values), float32."""
    seen = mask.queries if mask.keys is None else mask.keys
    length, keys = mask.queries.rows_BC.shape[1], seen.rows_BC.shape[1]
    shapes = [(2, length, heads, width), *[(2, keys, kv_heads, width)] * 2, (2, length, heads, width)]
    arrays = [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)]
    tables: Any = tuple(rotary_rows(of.positions_BC, width, 100.0) for of in (mask.queries, seen))

    @jax.jit
    def run(*arrays):
        def attention(q, k, v):
            if backend == "mosaic_tpu":
                return attend(q, k, v, mask, backend, tables)
            q, k = (apply_rotary(x, rotary_of_rows(of)) for x, of in zip((q, k), tables, strict=True))
            return attend(q, k, v, mask, backend)

        out, pull = jax.vjp(attention, *arrays[:3])
        return out, *pull(arrays[3])

    return run(*arrays)


# name: (queries, where they are selected; keys; documents; some not valid; query heads, key/value heads, head dim)
CASES = {
    "causal, odd heads": (None, 200, False, False, (3, 1, 64)),
    "documents, a program for each key/value head": (None, 263, True, False, (3, 3, 64)),
    "shared keys, some not valid": (141, 260, False, True, (1, 1, 64)),
    "shared keys, documents, wide heads": (77, 140, True, False, (2, 1, 128)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_path(name, monkeypatch):
    queries, keys, documents, valid, sizes = CASES[name]
    make_layout: Any = tpu.make_layout
    if "each key/value head" in name:  # vector memory for two of three groups, which are no equal parts
        monkeypatch.setattr(tpu, "_ROOM", 2 * 2**20)
        assert make_layout(keys, keys, *sizes, "float32").unit == 1
    view = _view(keys, documents, valid)
    mask = Mask(view) if queries is None else Mask(_selected(view, queries), view)
    assert bool(jnp.all(jnp.any(mask.dense(), axis=(1, 3))))
    got, expected = (_run(backend, mask, *sizes) for backend in ("mosaic_tpu", "xla"))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    for gradient, plain in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(gradient, plain, atol=1e-4)


def test_a_query_without_keys_is_finite_and_gives_no_gradient():
    """Every key of the first document is masked: its queries are arbitrary, the others as without them."""
    view = _view(140, documents=True)
    assert view.segments_BC is not None
    others = np.asarray(view.segments_BC > 1)[:, :, None, None]
    mask = Mask(dataclasses.replace(view, valid_BC=view.segments_BC > 1))
    got, plain = (_run(backend, mask, 1, 1, 16) for backend in ("mosaic_tpu", "xla"))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in got)
    np.testing.assert_allclose(np.where(others, got[0], 0), np.where(others, plain[0], 0), atol=1e-5)
    assert all(not np.any(np.where(others, 0, gradient)) for gradient in got[1:])


def test_every_device_attends_for_its_share():
    """Rows over data, tokens over context (an odd number), heads over tensor: the same as on one device."""
    view = _view(150, documents=True)
    mask = Mask(_selected(view, 75), view)
    alone = _run("mosaic_tpu", mask, 4, 2, 16)
    mesh = jax.make_mesh((1, 2, 1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    with jax.set_mesh(mesh):
        shared = _run("mosaic_tpu", mask, 4, 2, 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), shared, alone)


def test_a_layer_keeps_unrotated_keys_that_later_passes_rotate(monkeypatch):
    """One pass over all tokens, then one of some over the kept keys, a part of them replaced; as with XLA."""
    config = ModelConfig(d_model=32, num_heads=3, num_kv_heads=1, head_dim=16)
    view = _view(19)
    selection = select_mask(jnp.stack([jnp.arange(19) < 11, jnp.arange(19) >= 8]), 11)
    some = take_tokens(view, selection)
    module, x_BTD = Attention(config, PLAIN), jax.random.normal(jax.random.key(0), (2, 19, 32))
    first, later = make_context(config, view, keep_kv=True), make_context(config, some, keys=view, update=selection)
    variables = module.init(jax.random.key(1), x_BTD, first, None)
    observed = []

    def outputs(backend: str):
        monkeypatch.setattr(attention_module, "resolve_backend", lambda *_: backend)

        @jax.jit
        def run(variables, x_BTD):
            out, kept = module.apply(variables, x_BTD, first, None)
            return out, module.apply(variables, x_BTD[:, :11], later, kept)[0]

        watched = make_context(config, some, observe=lambda *x: observed.append(x))
        module.apply(variables, x_BTD[:, :11], watched, None)
        return run(variables, x_BTD)

    got, expected = outputs("mosaic_tpu"), outputs("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *observed)


def test_blocks_that_nothing_is_seen_of_are_skipped():
    """First and past-the-last block of those visited, then of those that need no mask: 128 queries, 128 keys each."""
    layout = make_layout(300, 300, 2, 2, 64, "bfloat16")
    table = lambda runs, **kwargs: np.asarray(visited_blocks(layout, runs, **kwargs)).reshape(3, 4).tolist()  # noqa: E731
    index_T = jnp.arange(384)
    causal = jnp.stack([jnp.zeros(384, jnp.int32), jnp.where(index_T < 300, index_T + 1, 0)])[None]
    assert table(causal) == [[0, 1, 0, 0], [0, 2, 0, 1], [0, 3, 0, 0]]  # the last block has queries that are no tokens
    assert table(causal, whole=False) == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]]
    later = causal.at[:, 0].set(jnp.where(index_T < 270, 0, 270))
    assert table(later) == [[0, 1, 0, 0], [0, 2, 0, 1], [0, 3, 3, 3]]
    blind = jnp.zeros((1, 2, 384), jnp.int32)
    assert all(past == first + 1 for first, past, *_ in table(blind))


def test_heads_are_cut_into_equal_parts_where_they_do_not_fit_together():
    unit = lambda heads, kv_heads, width: make_layout(2048, 2048, heads, kv_heads, width, "bfloat16").unit  # noqa: E731
    assert (unit(15, 5, 64), unit(9, 3, 64), unit(32, 32, 64), unit(16, 16, 128)) == (5, 3, 8, 4)
    assert [block_size(n) for n in (1, 511, 512, 683, 1024, 1365, 2048)] == [128, 128, 256, 256, 512, 512, 512]


def test_rows_too_long_for_vector_memory_are_cut_into_equal_parts_of_whole_blocks():
    assert [key_part(keys, 64, "bfloat16") for keys in (100, 8192)] == [100, 8192]
    part = key_part(32768, 64, "bfloat16")
    assert part == 16384 and key_part(33000, 64, "bfloat16") % 512 == 0


def test_parts_of_the_keys_add_up(monkeypatch):
    mask = Mask(_selected(_view(300, documents=True, valid=True), 70), _view(300, documents=True, valid=True))
    whole = _run("mosaic_tpu", mask, 3, 1, 64)
    monkeypatch.setattr(tpu, "key_part", lambda keys, *_: 128)
    for found, expected in zip(_run("mosaic_tpu", mask, 3, 1, 64), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_where_the_kernel_runs():
    assert resolve_tpu_backend("auto", "bfloat16", 64) == "mosaic_tpu"
    assert resolve_tpu_backend("auto", "bfloat16", 80) == "xla"
    assert resolve_tpu_backend("xla", "bfloat16", 64) == "xla"
    with pytest.raises(UserError, match="'mosaic_tpu' needs a head_dim that is a multiple of 64, not head_dim=80"):
        resolve_tpu_backend("mosaic_tpu", "bfloat16", 80)
    with pytest.raises(UserError, match="'cudnn' is a kernel for GPUs"):
        resolve_tpu_backend("cudnn", "bfloat16", 64)
    with pytest.raises(UserError, match="'mosaic_tpu' needs a TPU, not device='cpu'"):
        resolve_backend("mosaic_tpu", "bfloat16", 64)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_the_kernels_compile(generation):
    """Odd numbers of heads, an odd length, and a mask; heads in several programs; parts."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    device = describe_topology(f"{generation}:{GENERATIONS[generation].sizes[1]}").devices[0]
    placed = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    for tokens, heads, kv_heads, width, dtype, valid in (
        (1365, 15, 5, 64, "bfloat16", True),
        (2048, 32, 32, 64, "bfloat16", False),
        (300, 2, 1, 128, "float32", False),
        (32768, 2, 1, 64, "bfloat16", False),
    ):

        def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((2, *shape), dtype, sharding=placed)

        def both(q, k, v, *others):
            out, pull = jax.vjp(lambda *x: flash_attention(*x, *others), q, k, v)
            return pull(out)

        table = array(width, tokens, dtype="float32")
        masks = array(2, tokens, dtype="int32"), array(tokens, dtype="bool") if valid else None
        key_value = array(tokens, kv_heads, width)
        arguments = (array(tokens, heads, width), key_value, key_value, *masks, (table, table))
        text = jax.jit(both, out_shardings=placed).lower(*arguments).compile().as_text()
        parts = pl.cdiv(tokens, key_part(tokens, width, dtype))
        assert text is not None and text.count("tpu_custom_call") == 2 * parts

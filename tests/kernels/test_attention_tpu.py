"""The TPU kernel in Pallas' interpreter against the plain path, its tables of blocks, and where it is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mor_jax.errors import UserError
from mor_jax.kernels.attention import backend as attention_backend
from mor_jax.kernels.attention.backend import attend, resolve_backend, resolve_tpu_backend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.kernels.attention.tpu import block_size, splash_attention, visible_blocks
from mor_jax.mesh.mesh import MESH_AXES

BATCH, HEADS, KV_HEADS, WIDTH, KEYS, QUERIES = 2, 4, 2, 16, 300, 140


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(attention_backend, "splash_attention", functools.partial(splash_attention, interpret=True))


def _keys_view(documents: bool = False, valid: bool = False) -> TokenView:
    rows_BT = jnp.broadcast_to(jnp.arange(KEYS, dtype=jnp.int32)[None], (BATCH, KEYS))
    segments_BT = 1 + rows_BT // jnp.array([[110], [260]]) if documents else None
    valid_BT = jax.random.bernoulli(jax.random.key(7), 0.7, (BATCH, KEYS)).at[:, 0].set(True) if valid else None
    return TokenView(rows_BT, rows_BT, segments_BT, valid_BT)


def _selected(view: TokenView) -> TokenView:
    """Sorted random rows, and two empty seats at the end that hold rows out of order."""
    keys = jax.random.split(jax.random.key(3), BATCH)
    index_BC = jnp.sort(jax.vmap(lambda key: jax.random.permutation(key, KEYS)[:QUERIES])(keys), axis=1)
    index_BC = index_BC.at[:, -2:].set(5)
    take = lambda x_BT: jnp.take_along_axis(x_BT, index_BC, axis=1)  # noqa: E731
    return dataclasses.replace(jax.tree.map(take, view), valid_BC=None)


def _values_and_gradients(backend, queries, keys, length):
    shapes = [(BATCH, length, HEADS, WIDTH)] + [(BATCH, KEYS, KV_HEADS, WIDTH)] * 2
    arrays = [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)]
    weights = jax.random.normal(jax.random.key(1), shapes[0])

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(queries, keys), backend), *arrays)
        return out, pull(weights)

    return run(*arrays)


@pytest.mark.parametrize(
    ("shared", "documents", "valid"),
    [(True, True, False), (True, False, True), (False, False, False), (False, True, True)],
    ids=["shared-documents", "shared-mask", "causal", "causal-documents-mask"],
)
def test_kernel_equals_the_plain_path(shared, documents, valid):
    """Recursive sharing (selected queries over all keys) and causal attention, forward and backward, float32."""
    view = _keys_view(documents, valid)
    queries, keys, length = (_selected(view), view, QUERIES) if shared else (view, None, KEYS)
    got, expected = (_values_and_gradients(name, queries, keys, length) for name in ("splash", "xla"))
    seen_BT = np.asarray(jnp.any(Mask(queries, keys).dense(), axis=(1, 3)))
    where = seen_BT[:, :, None, None]
    np.testing.assert_allclose(np.where(where, got[0], 0), np.where(where, expected[0], 0), atol=2e-6)
    if seen_BT.all():  # what nothing is seen by is arbitrary, and so is its gradient
        for gradient, plain in zip(got[1], expected[1], strict=True):
            np.testing.assert_allclose(gradient, plain, atol=2e-5)


def test_a_query_without_keys_is_finite_and_leaves_the_others_alone():
    """Every key of the first document is masked: its queries are arbitrary, nothing becomes NaN."""
    view = _keys_view(documents=True)
    segments_BT = view.segments_BC
    assert segments_BT is not None
    view = dataclasses.replace(view, valid_BC=segments_BT > 1)
    (out, gradients) = _values_and_gradients("splash", view, None, KEYS)
    (plain, _) = _values_and_gradients("xla", view, None, KEYS)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (out, *gradients))
    others = np.asarray(segments_BT > 1)[:, :, None, None]
    np.testing.assert_allclose(np.where(others, out, 0), np.where(others, plain, 0), atol=2e-6)


def test_every_device_attends_for_its_share():
    """Rows over data, tokens over context, heads over tensor: the same as on one device."""
    view = _keys_view(documents=True)
    queries = _selected(view)
    alone = _values_and_gradients("splash", queries, view, QUERIES)
    mesh = jax.make_mesh((1, 2, 1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    with jax.set_mesh(mesh):
        shared = _values_and_gradients("splash", queries, view, QUERIES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), shared, alone)


def test_blocks_that_nothing_is_seen_of_are_skipped():
    """Two blocks of two queries, three blocks of two keys; documents of keys: 1 1 1 2 2 2."""
    rows_BT = jnp.array([[0, 3, 4, 5]])
    table = lambda x: ["".join("x" if v else "." for v in row) for row in np.asarray(x[0])]  # noqa: E731
    assert table(visible_blocks(rows_BT, None, 6, (2, 2))) == ["xx.", "xxx"]
    segments = (jnp.array([[1, 2, 2, 2]]), jnp.array([[1, 1, 1, 2, 2, 2]]))
    assert table(visible_blocks(rows_BT, segments, 6, (2, 2))) == ["xx.", ".xx"]


def test_a_blind_block_of_queries_still_visits_one_block():
    """The kernel divides by the sum of what it visited."""
    visible_BIJ = visible_blocks(jnp.full((1, 2), -1), None, 4, (2, 2))
    assert np.asarray(visible_BIJ[0]).tolist() == [[True, False]]


def test_blocks_grow_with_the_length():
    assert [block_size(n) for n in (1, 511, 512, 683, 1024, 1365, 2048)] == [128, 128, 256, 256, 512, 512, 512]


def test_where_the_kernel_runs():
    assert resolve_tpu_backend("auto", "bfloat16", 64) == "splash"
    assert resolve_tpu_backend("auto", "bfloat16", 80) == "xla"
    assert resolve_tpu_backend("xla", "bfloat16", 64) == "xla"
    with pytest.raises(UserError, match="'splash' needs a head_dim that is a multiple of 64, not head_dim=80"):
        resolve_tpu_backend("splash", "bfloat16", 80)
    with pytest.raises(UserError, match="'cudnn' is a kernel for GPUs"):
        resolve_tpu_backend("cudnn", "bfloat16", 64)
    with pytest.raises(UserError, match="'splash' needs a TPU, not device='cpu'"):
        resolve_backend("splash", "bfloat16", 64)

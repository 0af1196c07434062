"""The loss's kernel against the plain path: in Pallas' interpreter on a CPU, compiled on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.bench.measure import random_batch
from mor_jax.config import Config, MeshConfig, ModelConfig, PerfConfig, TrainConfig
from mor_jax.kernels import cross_entropy
from mor_jax.kernels.cross_entropy import RowTile, softmax_cross_entropy
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.loss import fused_cross_entropy
from mor_jax.model.transformer import init_params
from mor_jax.train.objective import loss_fn

TILE = RowTile(columns=32, warps=4)
GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def _chunk(tokens, vocabulary, dtype):
    """Logits, targets and weights, of which some are 0; one row has a logit far above the others."""
    random = np.random.default_rng(tokens)
    logits_MV = random.normal(0, 3, (tokens, vocabulary))
    logits_MV[1, vocabulary // 2] = 80.0
    targets_M = random.integers(0, vocabulary, tokens)
    targets_M[:2] = vocabulary - 1, vocabulary // 2
    weights_M = random.integers(0, 3, tokens)
    weights_M[2] = 0
    return jnp.asarray(logits_MV, dtype), jnp.asarray(targets_M, jnp.int32), jnp.asarray(weights_M, jnp.float32)


def _plain(logits_MV, targets_M, weights_M, z_coefficient):
    """The same in numpy's float64."""
    logits_MV, weights_M = np.asarray(logits_MV, np.float64), np.asarray(weights_M, np.float64)
    top_M = logits_MV.max(axis=1)
    lse_M = top_M + np.log(np.exp(logits_MV - top_M[:, None]).sum(axis=1))
    grad_MV = np.exp(logits_MV - lse_M[:, None]) * (1 + 2 * z_coefficient * lse_M)[:, None]
    rows = np.arange(len(lse_M))
    grad_MV[rows, targets_M] -= 1
    return grad_MV * weights_M[:, None], lse_M - logits_MV[rows, targets_M], lse_M


def _check(tokens, vocabulary, logits_dtype, dtype, z_coefficient, tile):
    logits_MV, targets_M, weights_M = _chunk(tokens, vocabulary, logits_dtype)
    wanted = _plain(logits_MV, targets_M, weights_M, z_coefficient)
    function = jax.jit(softmax_cross_entropy, static_argnums=(3, 4, 5))
    grad_MV, nll_M, lse_M = function(logits_MV, targets_M, weights_M, dtype, z_coefficient, tile)
    assert (grad_MV.dtype, nll_M.dtype, lse_M.dtype) == (dtype, jnp.float32, jnp.float32)
    rounding = 2e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(grad_MV, np.float64), wanted[0], rtol=rounding, atol=2e-6)
    np.testing.assert_allclose(nll_M, wanted[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse_M, wanted[2], rtol=1e-6)
    assert not np.asarray(grad_MV, np.float64)[2].any()


@pytest.mark.parametrize(("tokens", "vocabulary"), [(4, 96), (7, 101), (5, 20)])
@pytest.mark.parametrize(
    ("logits_dtype", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("z_coefficient", [0.0, 0.03])
def test_kernel_equals_the_plain_softmax(tokens, vocabulary, logits_dtype, dtype, z_coefficient):
    """Vocabularies of whole blocks, of a partial one, and smaller than one."""
    _check(tokens, vocabulary, logits_dtype, dtype, z_coefficient, TILE)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("tile", [cross_entropy.TILE, RowTile(1024, 4), RowTile(4096, 32)])
@pytest.mark.parametrize("vocabulary", [49152, 50257, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_kernel_does_too(tile, vocabulary, dtype):
    """More rows than an H100 works on at once with the largest tile."""
    _check(300, vocabulary, dtype, dtype, 1e-4, tile)


def _arguments(dtype, length=22, width=8, vocabulary=101):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_BTD = jax.random.normal(keys[0], (8, length, width)).astype(dtype)
    weights_BT = jax.random.bernoulli(keys[3], 0.7, (8, length)).astype(jnp.float32)
    targets_BT = jax.random.randint(keys[2], (8, length), 0, vocabulary)
    return hidden_BTD, jax.random.normal(keys[1], (vocabulary, width)), targets_BT, weights_BT


def _value_and_gradients(arguments, chunk=5, **settings):
    hidden_BTD, head_VD, *rest = arguments

    def total(hidden_BTD, head_VD):
        entropy = fused_cross_entropy(hidden_BTD, head_VD, *rest, chunk=chunk, **settings)
        return entropy.loss_sum, entropy

    (_, entropy), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden_BTD, head_VD)
    return jax.tree.leaves((dataclasses.astuple(entropy), gradients))


def _compare(found, wanted, tolerance):
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was traced; its blocks are small."""
    seen = []

    def counted(logits_MV, *rest, **settings):
        seen.append(logits_MV.shape)
        return softmax_cross_entropy(logits_MV, *rest, tile=TILE, **settings)

    monkeypatch.setattr(cross_entropy, "softmax_cross_entropy", counted)
    return seen


@pytest.mark.parametrize("z_coefficient", [0.0, 0.03])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_loss_with_the_kernel_equals_the_one_without(z_coefficient, dtype, tolerance, calls):
    """22 positions in chunks of 5: the last chunk is filled up with tokens of weight 0."""
    settings = {"z_coefficient": z_coefficient, "logits_dtype": dtype}
    arguments = _arguments(dtype)
    wanted = _value_and_gradients(arguments, **settings)
    assert not calls
    found = _value_and_gradients(arguments, fused=True, **settings)
    assert calls == [(40, 101)]
    _compare(found, wanted, tolerance)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_compiled_loss_with_the_kernel_equals_the_one_without(dtype, tolerance):
    """At the size of a model: 8 rows in three chunks of 96 positions, the last one not full."""
    hidden_BTD, head_VD, *rest = _arguments(dtype, 250, 960, 49152)
    arguments = (hidden_BTD, head_VD / 30, *rest)
    settings = {"chunk": 96, "z_coefficient": 1e-4, "logits_dtype": dtype}
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):  # not TF32
        wanted = _value_and_gradients(arguments, **settings)
        found = _value_and_gradients(arguments, fused=True, **settings)
    _compare(found, wanted, tolerance)


@pytest.mark.parametrize(
    ("mesh", "kernel"), [(MeshConfig(data=2, fsdp=2), True), (MeshConfig(data=2, fsdp=2, tensor=2), False)]
)
def test_on_a_mesh_the_kernel_takes_whole_vocabularies(mesh, kernel, calls):
    hidden_BTD, head_VD, *rest = _arguments("float32")
    arguments = (hidden_BTD, head_VD[:96], rest[0] % 96, rest[1])
    wanted = _value_and_gradients(arguments, z_coefficient=0.01)
    devices = jax.devices()[: 4 * mesh.tensor]
    with jax.set_mesh(make_mesh(mesh, devices)):
        found = _value_and_gradients(arguments, z_coefficient=0.01, fused=True)
    assert calls == ([(10, 96)] if kernel else [])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["xla", "triton"])
def test_perf_fusion_chooses_the_kernel_in_the_train_step(fusion, calls):
    model = ModelConfig(48, 2, 16, 2, 1, 8, 24, 21, dtype="float32")
    perf = PerfConfig(fusion=fusion, attention_backend="xla", loss_chunk=16)
    config = Config(model=model, train=TrainConfig(batch_size=2, steps=100), perf=perf)
    batch = {name: jnp.asarray(x) for name, x in random_batch(model, 2, packed=False, seed=0).items()}
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    bias_R, key = jnp.zeros(1), jax.random.key(1)
    jax.eval_shape(jax.grad(lambda params: loss_fn(config, params, bias_R, batch, key, None)[0]), params)
    assert calls == ([(32, 48)] if fusion == "triton" else [])


def test_a_chunk_too_large_to_address_is_left_to_xla():
    assert cross_entropy.can_address(43_690, 49_152) and not cross_entropy.can_address(43_691, 49_152)

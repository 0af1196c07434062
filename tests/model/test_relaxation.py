"""Low-rank updates and the recursion encoding: nothing at first, something afterwards, the same in every execution."""

import dataclasses

import jax
import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RelaxationConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.model.forward import forward
from mor_jax.model.transformer import init_params, logical_axes

MODEL = ModelConfig(
    vocab_size=17, num_layers=6, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=8,
    dtype="float32", init_std=0.3,
    recursion=RecursionConfig(2, "middle_cycle", relaxation=RelaxationConfig(lora_rank=2, encoding=True)),
)  # fmt: skip
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (2, 8)).astype(np.int32)


def _without(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, recursion=dataclasses.replace(model.recursion, relaxation=RelaxationConfig()))


def _noisy(params):
    generator = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + generator.normal(size=x.shape, scale=0.2).astype(np.float32), params)


def test_a_fresh_relaxation_changes_nothing():
    params = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    plain = {name: value for name, value in params.items() if name not in ("lora", "encoding")}
    relaxed, unrelaxed = (forward(m, p, TOKENS_BT).logits for m, p in ((MODEL, params), (_without(MODEL), plain)))
    np.testing.assert_array_equal(relaxed, unrelaxed)
    assert params["lora"]["query_down"].shape == (2, 2, 8, 2) and params["encoding"]["scale"].shape == (2, 8)


def test_every_relaxation_parameter_is_sharded_by_name():
    axes = logical_axes(MODEL)
    assert axes["lora"]["down_down"] == ("recursions", "layers", "ffn", None)
    assert axes["lora"]["key_value_up"] == ("recursions", "layers", None, None, "kv_heads", "head_dim")
    assert axes["encoding"]["scale"] == ("recursions", "embed")


@pytest.mark.parametrize(
    "routing",
    [RoutingConfig(), pytest.param(RoutingConfig("token", score="softmax", alpha=1.0), marks=pytest.mark.slow)],
)
def test_gather_equals_scan_with_gradients(routing):
    slack = dataclasses.replace(routing, capacity_slack=3.0)
    model = dataclasses.replace(MODEL, routing=slack)
    params = _noisy(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))

    def run(execution):
        def loss(p):
            return forward(model, p, TOKENS_BT, execution=execution).losses["total"]

        return jax.jit(jax.value_and_grad(loss))(params)

    (a, grad_a), (b, grad_b) = run("gather"), run("scan")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grad_a, grad_b)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves((grad_a["lora"], grad_a["encoding"])))


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UserError, match="relaxation needs a parameter sharing"):
        RecursionConfig(relaxation=RelaxationConfig(lora_rank=1))
    with pytest.raises(UserError, match=r"relaxation.encoding=True.*sharing='sequence'"):
        RecursionConfig(2, "sequence", relaxation=RelaxationConfig(encoding=True))
    with pytest.raises(UserError, match=r"relaxation.lora_targets='querry' is not one of"):
        RelaxationConfig(lora_rank=1, lora_targets=("querry",))  # type: ignore[arg-type]

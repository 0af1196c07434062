"""Tiny models of every kind that decodes, and what the full causal forward pass says of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig, RecursionConfig, ResolvedPerf, RoutingConfig
from mor_jax.evaluate.depth_cap import cap_depth
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk, init_params

VOCABULARY = 31
_ROUTINGS = {
    "none": RoutingConfig(),
    "expert": RoutingConfig("expert"),
    # every recursion turns tokens away, by an auxiliary router with calibrated boundaries
    "expert-aux": RoutingConfig(
        "expert",
        router="mlp",
        sampling="aux_router",
        capacities=(0.8, 0.6, 0.4),
        boundaries=(-0.2, 0.1, 0.0),
        alpha=1.0,
    ),
    "token": RoutingConfig("token", score="softmax", alpha=1.0),
    "token-bias": RoutingConfig("token", score="sigmoid", balancing="loss_free", residual="plain"),
}


def model_config(
    routing: str = "expert", sharing: str = "middle_cycle", kv: str = "recursion", **fields: Any
) -> ModelConfig:
    """A model of three recursions (vanilla: one) in float32, with scores that send tokens everywhere."""
    share_norms, count = fields.pop("share_norms", True), 1 if sharing == "none" else 3
    recursion = RecursionConfig(count, sharing, share_norms=share_norms, kv_strategy=kv)  # type: ignore[arg-type]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_layers": 8 if "middle" in sharing else 6, "d_model": 16, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "d_ff": 24, "context_length": 64, "dtype": "float32", "init_std": 0.3,
    }  # fmt: skip
    if sharing == "none":
        sizes["num_layers"] = 3
    return ModelConfig(**{**sizes, **fields}, recursion=recursion, routing=_ROUTINGS[routing])


@functools.cache
def make_params(config: ModelConfig) -> Any:
    """Random parameters; norm scales too, so that unshared ones differ."""
    params = jax.jit(lambda: init_params(config, jax.random.key(1)))()
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def router_bias(config: ModelConfig) -> jax.Array | None:
    """A loss-free bias that moves choices, for the model that has one."""
    return jnp.array([0.004, 0.004, -0.002]) if config.routing.balancing == "loss_free" else None


@functools.cache
def decode_model(config: ModelConfig) -> DecodeModel:
    """The model with ``make_params``, ready to decode."""
    return prepare_weights(config, make_params(config), router_bias_R=router_bias(config))


@functools.cache
def full_forward(config: ModelConfig, max_depth: int | None = None) -> Any:
    """Compiled ``f(tokens_BT) -> (logits_BTV, depth_BT)`` of the full forward pass under `threshold`, as evaluated."""
    weights = Weights(config, make_params(config), router_bias(config))
    weights = weights if max_depth is None else cap_depth(weights, max_depth)

    @jax.jit
    def run(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = apply_trunk(weights, ResolvedPerf(execution="scan"), Rows(tokens_BT), mode="threshold")
        passes = kv_layout(weights.config).passes
        depth_BT = jnp.full(tokens_BT.shape, passes) if output.trace is None else output.trace.depth_BT
        return output.hidden_BTD @ head_matrix(weights.config, weights.params).T, depth_BT

    return run


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random int32 tokens [rows, length]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length)).astype(np.int32)

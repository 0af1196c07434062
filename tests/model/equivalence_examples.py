"""Small models, packed rows and the comparison of two computations, values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_routing
from plain_reference import plain_model, read_rows

from mor_jax.config import PLAIN, Execution, ModelConfig, RecursionConfig, ResolvedPerf, RoutingConfig
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.routing.capacity import routed_tokens
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk, init_params

EXPERT = RoutingConfig("expert")
TOKEN = RoutingConfig("token", score="softmax", alpha=1.0, capacity_slack=9.0)  # seats for all
LENGTH, VOCAB = 12, 13
TOLERANCE = 1e-5
LOSSES = {"sampling": 0.7, "aux_router": 0.6, "balancing": 0.5, "router_z": 0.3}
"""Weights with which router losses enter the scalar that is differentiated."""


def small_model(recursion: RecursionConfig, routing: RoutingConfig | None = None, **changes: Any) -> ModelConfig:
    """Two layers in the block; sizes that do not coincide."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "d_ff": 14,
        "context_length": LENGTH, "dtype": "float32", "attend_across_documents": False,
        "num_layers": (2 if recursion.has_middle else 0) + 2 * recursion.num_recursions,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes}, recursion=recursion, routing=routing or RoutingConfig())


@functools.cache
def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters in which nothing is alike, norm scales included; drawn by numpy, which has nothing to compile."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(generator.normal(centre, 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    )


@functools.cache
def batch(packed: bool) -> dict[str, Any]:
    """Two rows; packed: documents of 3, 5 and 3 tokens and one of padding, and of 7 and 5."""
    tokens_BT = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    if not packed:
        return {"tokens_BT": tokens_BT, "segments_BT": None, "positions_BT": None}
    lengths = ((3, 5, 3), (7, 5))
    segments_BT, positions_BT = np.zeros((2, 2, LENGTH), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            segments_BT[row, start : start + length] = number + 1
            positions_BT[row, start : start + length] = np.arange(length)
            start += length
    return {"tokens_BT": tokens_BT, "segments_BT": segments_BT, "positions_BT": positions_BT}


def _scalar(logits_BTV: jax.Array, losses: dict[str, jax.Array]) -> jax.Array:
    weights = jax.random.normal(jax.random.key(7), logits_BTV.shape)
    return jnp.mean(weights * logits_BTV) + sum(LOSSES[name] * value for name, value in losses.items())


def by_model(config: ModelConfig, params: Any, execution: Execution, packed: bool, **arguments: Any) -> Any:
    """((scalar, values), gradients) of the model under an execution."""
    tokens_BT, segments_BT, positions_BT = batch(packed).values()
    rows = Rows(tokens_BT, positions_BT, segments_BT)

    def run(params: Any) -> Any:
        output = apply_trunk(Weights(config, params), ResolvedPerf(execution=execution), rows, **arguments)
        logits_BTV = output.hidden_BTD @ head_matrix(config, params).T
        losses = {} if output.trace is None else {name: getattr(output.trace.losses, name) for name in LOSSES}
        depth_BT = None if output.trace is None else output.trace.depth_BT
        return _scalar(logits_BTV, losses), {"logits": logits_BTV, "depth": depth_BT, "losses": losses}

    return jax.jit(jax.value_and_grad(run, has_aux=True))(params)


def only_logits(config: ModelConfig, params: Any, router_bias_R: Any = None, **arguments: Any) -> jax.Array:
    """Logits of the rows that are not packed, without gradients."""

    @jax.jit
    def run(params: Any) -> jax.Array:
        rows = Rows(batch(packed=False)["tokens_BT"])
        output = apply_trunk(Weights(config, params, router_bias_R), PLAIN, rows, **arguments)
        return output.hidden_BTD @ head_matrix(config, params).T

    return run(params)


def by_plain_loop(config: ModelConfig, params: Any, packed: bool, choose: Any = None) -> Any:
    """((scalar, values), gradients) of the plain loop over unshared layers."""
    route = {"none": None, "expert": plain_routing.expert, "token": plain_routing.token}[config.routing.kind]
    if choose is None and config.routing.kind == "expert":
        choose = plain_routing.TopK(routed_tokens(config, LENGTH))

    def run(params: Any) -> Any:
        rows = read_rows(config, *batch(packed).values())
        plain = plain_model(config, params, rows, choose=choose, route=route)
        losses = {name: plain.losses.get(name, jnp.zeros(())) for name in LOSSES} if route else {}
        values = {"logits": plain.logits_BTV, "depth": plain.depth_BT, "losses": losses}
        return _scalar(plain.logits_BTV, losses), values

    return jax.value_and_grad(run, has_aux=True)(params)


def assert_close(ours: Any, theirs: Any) -> None:
    """Every leaf, to 1e-5 of its largest entry (or of 1, if that is larger)."""

    def check(path: Any, a: Any, b: Any) -> None:
        scale = max(1.0, float(np.abs(b).max()))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=where)

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def assert_computes_the_same(ours: Any, theirs: Any) -> None:
    """Values and gradients agree, and no part of the tree is without a gradient."""
    assert_close(ours, theirs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs[1]):
        assert float(np.abs(leaf).max()) > 1e-6, f"no gradient at {jax.tree_util.keystr(path)}"

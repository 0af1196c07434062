"""The model written down a second time: a Python loop over unshared copies of the layers, whole rows, plain masks.

Independent of the executions: it shares no code with `mor_jax.model` and reads only the configuration and the parameter
tree. Simple on purpose, and not jitted as a whole. Letters: B rows, T tokens, S keys, D width, R recursions.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig

Layer = dict[str, jax.Array]
HIDDEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    """What the plain model gives."""

    logits_BTV: jax.Array
    depth_BT: jax.Array | None = None
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Sizes(NamedTuple):
    """What a single layer depends on; the same for all models of a test, so that a layer is compiled once."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float

    @classmethod
    def of(cls, config: ModelConfig) -> "Sizes":
        """Take them from a configuration."""
        return cls(**{name: getattr(config, name) for name in cls._fields})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """A batch: what each token may see, and where it stands."""

    tokens_BT: jax.Array
    positions_BT: jax.Array
    visible_BTS: jax.Array
    """Causal, and inside documents if the model says so."""
    counted_BT: jax.Array
    """No padding."""


def read_rows(config: ModelConfig, tokens_BT: Any, segments_BT: Any = None, positions_BT: Any = None) -> Rows:
    """Describe a batch, packed or not."""
    batch, length = tokens_BT.shape
    order = jnp.arange(length)
    visible_BTS = jnp.broadcast_to(order[None, None, :] <= order[None, :, None], (batch, length, length))
    counted_BT = jnp.ones((batch, length), bool)
    if segments_BT is not None:
        counted_BT = jnp.asarray(segments_BT) > 0
        if not config.attend_across_documents:
            visible_BTS = visible_BTS & (segments_BT[:, None, :] == segments_BT[:, :, None])
    if positions_BT is None or config.rotary_positions == "row":
        positions_BT = jnp.broadcast_to(order[None], (batch, length))
    return Rows(jnp.asarray(tokens_BT), jnp.asarray(positions_BT), visible_BTS, counted_BT)


def unshare(config: ModelConfig, params: Any) -> tuple[Layer | None, list[list[Layer]], Layer | None]:
    """Copy the shared parameters: (first layer, layers[recursion][place in the block], last layer)."""

    def one(tree: Any, norms: Any) -> Layer:
        attention, ffn = tree["attention"], tree["ffn"]
        return {
            "attention_norm": norms["attention_norm"]["scale"],
            "query": attention["query"],
            "key": attention["key_value"][:, 0],
            "value": attention["key_value"][:, 1],
            "output": attention["output"],
            "ffn_norm": norms["ffn_norm"]["scale"],
            "gate": ffn["gate_up"][:, 0],
            "up": ffn["gate_up"][:, 1],
            "down": ffn["down"],
            **{name: attention[name]["scale"] for name in ("query_norm", "key_norm") if config.parts.qk_norm},
        }

    def layer(r: int, j: int) -> Layer:
        tree = jax.tree.map(lambda leaf: leaf[j], params["block"])
        norms = tree if config.recursion.share_norms else jax.tree.map(lambda leaf: leaf[r, j], params["block_norms"])
        own = {"share": params["value_residual"]["scale"][r, j]} if config.parts.value_residual else {}
        return one(tree, norms) | own

    grid = [[layer(r, j) for j in range(config.block_depth)] for r in range(config.recursion.num_recursions)]
    first, last = (one(params[name], params[name]) if name in params else None for name in ("first", "last"))
    return first, grid, last


def _norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale[None, None, :]


def _rotate(x_BTH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    half = x_BTH.shape[-1] // 2
    turned = []
    for i in range(half):
        angle = positions_BT * theta ** (-i / half)
        a, b = x_BTH[..., i], x_BTH[..., i + half]
        turned.append((a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)))
    return jnp.stack([a for a, _ in turned] + [b for _, b in turned], axis=-1)


@functools.partial(jax.jit, static_argnames="sizes")
def keys_values(sizes: Sizes, w: Layer, x_BTD: jax.Array, rows: Rows, first: Any = None) -> Any:
    """Rotated keys and values of every key/value head, [B, T, H] each; ``first`` are the first layer's, to mix in."""
    h_BTD = _norm(x_BTD, w["attention_norm"], sizes.norm_epsilon)
    pairs = []
    for k in range(sizes.num_kv_heads):
        key_BTH, value_BTH = _headed(sizes, w, "key", h_BTD @ w["key"][:, k]), h_BTD @ w["value"][:, k]
        if first is not None:
            value_BTH = (1 - w["share"]) * value_BTH + w["share"] * first[k][1]
        pairs.append((_rotate(key_BTH, rows.positions_BT, sizes.rope_theta), value_BTH))
    return pairs


def _headed(sizes: Sizes, w: Layer, name: str, x_BTH: jax.Array) -> jax.Array:
    """A head, normalised if the layer does that."""
    return _norm(x_BTH, w[f"{name}_norm"], sizes.norm_epsilon) if f"{name}_norm" in w else x_BTH


@functools.partial(jax.jit, static_argnames="sizes")
def apply_layer(sizes: Sizes, w: Layer, x_BTD: jax.Array, rows: Rows, visible_BTS: jax.Array, kv: Any) -> jax.Array:
    """One Transformer layer whose queries read given keys and values."""
    h_BTD = _norm(x_BTD, w["attention_norm"], sizes.norm_epsilon)
    attended = jnp.zeros_like(x_BTD)
    for n in range(sizes.num_heads):
        query_BTH = _headed(sizes, w, "query", h_BTD @ w["query"][:, n])
        query_BTH = _rotate(query_BTH, rows.positions_BT, sizes.rope_theta)
        key_BSH, value_BSH = kv[n // (sizes.num_heads // sizes.num_kv_heads)]
        scores_BTS = query_BTH @ jnp.swapaxes(key_BSH, 1, 2) / math.sqrt(sizes.head_dim)
        weights_BTS = jax.nn.softmax(jnp.where(visible_BTS, scores_BTS, HIDDEN), axis=-1)
        attended += weights_BTS @ value_BSH @ w["output"][n]
    x_BTD = x_BTD + attended
    h_BTD = _norm(x_BTD, w["ffn_norm"], sizes.norm_epsilon)
    gate = h_BTD @ w["gate"]
    return x_BTD + (gate * jax.nn.sigmoid(gate) * (h_BTD @ w["up"])) @ w["down"]


def apply_own(sizes: Sizes, w: Layer, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """One layer that all tokens take, with its own keys and values."""
    return apply_layer(sizes, w, x_BTD, rows, rows.visible_BTS, keys_values(sizes, w, x_BTD, rows))


class PlainBlock:
    """One recursion after the other over unshared layers; remembers recursion 1's keys and values."""

    def __init__(self, config: ModelConfig, grid: list[list[Layer]], rows: Rows, values: Any = None) -> None:
        self.config, self.grid, self.rows = config, grid, rows
        self.first: list[Any] = []
        self.values = values
        """The first layer's keys and values, whose values are mixed in."""

    def __call__(self, r: int, x_BTD: jax.Array, taken_BT: jax.Array) -> jax.Array:
        """Pass r of the tokens in ``taken_BT``; other rows of the result mean nothing."""
        sizes, rows, strategy = Sizes.of(self.config), self.rows, self.config.recursion.kv_strategy
        visible_BTS = rows.visible_BTS
        if strategy == "recursion":
            visible_BTS = visible_BTS & taken_BT[:, None, :]
        for j, w in enumerate(self.grid[r]):
            kv = keys_values(sizes, w, x_BTD, rows, self.values)
            if strategy != "recursion" and r == 0:
                self.first.append(kv)
            elif strategy == "shared":
                kv = self.first[j]
            elif strategy == "shared_update":
                taken = taken_BT[:, :, None]
                kv = [
                    (jnp.where(taken, key, key_1), jnp.where(taken, value, value_1))
                    for (key, value), (key_1, value_1) in zip(kv, self.first[j], strict=True)
                ]
            x_BTD = apply_layer(sizes, w, x_BTD, rows, visible_BTS, kv)
        return x_BTD


def _recursive(config: ModelConfig, block: PlainBlock, x_BTD: jax.Array) -> jax.Array:
    """Every token takes every layer: cycle goes through the block again and again, sequence repeats each layer."""
    recursions, grid, rows = range(config.recursion.num_recursions), block.grid, block.rows
    if not config.recursion.is_sequence:
        everyone = jnp.ones(rows.tokens_BT.shape, bool)
        for r in recursions:
            x_BTD = block(r, x_BTD, everyone)
        return x_BTD
    sizes = Sizes.of(config)
    for j in range(config.block_depth):
        kv = None
        for r in recursions:
            if kv is None or config.recursion.kv_strategy == "recursion":
                kv = keys_values(sizes, grid[r][j], x_BTD, rows)
            x_BTD = apply_layer(sizes, grid[r][j], x_BTD, rows, rows.visible_BTS, kv)
    return x_BTD


def plain_model(config: ModelConfig, params: Any, rows: Rows, *, choose: Any = None, route: Any = None) -> Plain:
    """Run the whole model.

    Args:
        config: the model.
        params: its parameter tree.
        rows: the batch.
        choose: see `plain_routing`.
        route: `plain_routing.expert` or `plain_routing.token` for a model with a router.
    """
    sizes, (first, grid, last) = Sizes.of(config), unshare(config, params)
    x_BTD = params["embedding"]["embedding"][rows.tokens_BT]
    values = None
    if config.parts.value_residual:
        values = keys_values(sizes, grid[0][0], x_BTD, rows)
    x_BTD = x_BTD if first is None else apply_own(sizes, first, x_BTD, rows)
    depth_BT, losses, block = None, {}, PlainBlock(config, grid, rows, values)
    if route is None:
        x_BTD = _recursive(config, block, x_BTD)
    else:
        x_BTD, depth_BT, losses = route(config, params, block, x_BTD, rows, choose)
    x_BTD = x_BTD if last is None else apply_own(sizes, last, x_BTD, rows)
    hidden_BTD = _norm(x_BTD, params["final_norm"]["scale"], config.norm_epsilon)
    head_DV = params["embedding"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return Plain(hidden_BTD @ head_DV, depth_BT, losses)

"""Parameters, FLOPs and key/value bytes of a model: the paper's count and the exact one (paper section 3.1, table 2).

All by arithmetic on the configuration, without JAX: ``mor presets`` and the command line's help need no more.

The paper counts a forward pass only, without embedding and head, ignores grouped-query attention, and takes half of the
attention scores. The exact count takes every matrix product of the training step: head, grouped-query attention and
backward pass included, rematerialisation and element-wise work left out. One multiply-add is 2 FLOPs.

Letters: D F N K H V as everywhere; C tokens computed, S keys attended to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from mor_jax.config import Config, Execution, LoraTarget, ModelConfig
from mor_jax.model.routing.capacity import routed_tokens, token_seats
from mor_jax.model.weight_axes import widths

AttentionWork = Literal["causal", "full", "flash"]
"""Which attention scores count: those that causality needs (`causal`), all of them (`full`: what the plain backend
executes), or those that it needs with the forward scores made again in the backward pass (`flash`)."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, as table 6 splits them."""

    non_embedding: int
    """Everything but embedding and untied head."""
    embedding: int
    """Embedding, and the head where it is untied."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.non_embedding + self.embedding


@dataclass(frozen=True)
class LayerPass:
    """Layer applications of equal shape in the forward pass of one row."""

    layers: int
    """Layer applications."""
    computed: int
    """C: tokens that the layer computes."""
    projected: int
    """Tokens whose keys and values it projects."""
    keys: int
    """S: keys that each of its queries is compared with, before causality."""


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model: the entries of the tree that ``init_params`` makes."""
    recursion, d = model.recursion, model.d_model
    relaxation, count = recursion.relaxation, recursion.num_recursions
    parts = {
        "block": block_parameters(model),
        "unique layers": 2 * (_layer_weights(model) + 2 * d + _head_norms(model)) if recursion.has_middle else 0,
        "final norm": d,
        "unshared norms": 0 if recursion.share_norms else count * model.block_depth * 2 * d,
        "low-rank updates": count * model.block_depth * _lora_weights(model, relaxation.lora_targets),
        "recursion encoding": count * d if relaxation.encoding else 0,
        "parts by recursion": _stacked_parts(model),
        "routers": _num_routers(model) * _router_weights(model),
    }
    embedding = model.vocab_size * d * (1 if model.tie_embeddings else 2)
    return ParameterCount(non_embedding=sum(parts.values()), embedding=embedding)


def block_parameters(model: ModelConfig) -> int:
    """Count the parameters of the shared block, without what its recursions do not share."""
    norms = 2 * model.d_model if model.recursion.share_norms else 0
    return model.block_depth * (_layer_weights(model) + norms + _head_norms(model))


def _head_norms(model: ModelConfig) -> int:
    """Entries of one layer's norms of queries and keys."""
    return 2 * model.head_dim if model.parts.qk_norm else 0


def _stacked_parts(model: ModelConfig) -> int:
    """Entries of the scales that parts have by recursion."""
    return model.recursion.num_recursions * model.block_depth if model.parts.value_residual else 0


def _layer_weights(model: ModelConfig) -> int:
    """Entries of one layer's matrices."""
    return sum(inputs * outputs for inputs, outputs in (widths(model, weight) for weight in get_args(LoraTarget)))


def _lora_weights(model: ModelConfig, targets: Iterable[LoraTarget]) -> int:
    """Entries of one layer's low-rank updates of some weights in one recursion."""
    return model.recursion.relaxation.lora_rank * sum(sum(widths(model, target)) for target in targets)


def _num_routers(model: ModelConfig) -> int:
    """Routers with weights of their own."""
    routing = model.routing
    if routing.kind != "expert":
        return int(routing.kind == "token")
    return model.recursion.num_recursions * (2 if routing.has_aux_router else 1)


def _router_weights(model: ModelConfig) -> int:
    """Entries of one router's matrices."""
    routing, d = model.routing, model.d_model
    outputs = 1 if routing.kind == "expert" else model.recursion.num_recursions
    if routing.router == "linear":
        return d * outputs
    hidden = routing.hidden_expansion * d
    return hidden * (d + outputs)


def paper_flops_per_token(model: ModelConfig, length: int | None = None) -> float:
    """Return the paper's forward FLOPs per token: what its budgets of 2e18, 5e18 and 16.5e18 are made of.

    Args:
        model: capacities are those after every warm-up, before rounding to whole tokens.
        length: S, tokens per row; None is the model's context.

    References:
        Bae et al., section 3.1 and appendix; the formula reproduces every released step count.
    """
    length = model.context_length if length is None else length
    shares_kv = model.recursion.kv_strategy == "shared"
    d, f = model.d_model, model.d_ff
    unique = 2 if model.recursion.has_middle else 0
    total = unique * _paper_layer(d, f, length, capacity=1.0, keys=1.0, projects=True)
    for recursion, capacity in enumerate(model.capacities):
        keys, projects = (1.0, recursion == 0) if shares_kv else (capacity, True)
        total += model.block_depth * _paper_layer(d, f, length, capacity=capacity, keys=keys, projects=projects)
    return total


def _paper_layer(d: int, f: int, length: int, *, capacity: float, keys: float, projects: bool) -> float:
    projections = 4 * d**2 + 3 * d * f - (0 if projects else 2 * d**2)
    return capacity * (2 * projections + keys * 4 * d * length / 2)


def layer_passes(model: ModelConfig, length: int, execution: Execution = "gather") -> list[LayerPass]:
    """List the layer applications of one row's forward pass, as an execution computes them.

    Args:
        model: capacities after every warm-up; token-choice counts its seats, whether taken or not.
        length: tokens per row.
        execution: `scan` computes every token in every recursion.

    Returns:
        One entry per group of equal layers, in order.
    """
    recursion, routing = model.recursion, model.routing
    count, depth = recursion.num_recursions, model.block_depth
    full = LayerPass(1, length, length, length)
    if recursion.is_sequence:
        repeated = LayerPass(depth * (count - 1), length, 0 if recursion.kv_strategy == "shared" else length, length)
        passes = [LayerPass(depth, length, length, length), repeated]
    else:
        if routing.kind == "none" or execution == "scan":
            computed: tuple[int, ...] = (length,) * count
        else:
            computed = token_seats(model, length) if routing.kind == "token" else routed_tokens(model, length)
        passes = [_recursion_pass(model, r, c, length, execution) for r, c in enumerate(computed)]
    return [full, *passes, full] if recursion.has_middle else passes


def _recursion_pass(model: ModelConfig, recursion: int, computed: int, length: int, execution: Execution) -> LayerPass:
    strategy, depth = model.recursion.kv_strategy, model.block_depth
    if strategy == "recursion":
        return LayerPass(depth, computed, computed, computed)
    if recursion == 0:  # every token supplies keys and values
        return LayerPass(depth, length, length, length)
    # scan has one body for all recursions: it makes every token's anew, then keeps recursion 1's
    projected = length if execution == "scan" else computed if strategy == "shared_update" else 0
    return LayerPass(depth, computed, projected, length)


def _attention_pairs(layer_pass: LayerPass, work: AttentionWork) -> float:
    """Query-key pairs per layer; among foreign keys a query sees half of them on average."""
    pairs = layer_pass.computed * layer_pass.keys
    return float(pairs) if work == "full" else layer_pass.computed * (layer_pass.keys + 1) / 2


def forward_flops(
    model: ModelConfig,
    length: int | None = None,
    *,
    execution: Execution = "gather",
    attention: AttentionWork = "causal",
) -> dict[str, float]:
    """Count the matrix products of one row's forward pass.

    Args:
        model: the model.
        length: tokens per row; None is the model's context.
        execution: see ``layer_passes``.
        attention: see ``AttentionWork``.

    Returns:
        FLOPs of `block` (projections, feed-forward and low-rank updates of all layers), `attention` (scores and
        weighted values), `router` and `head`.
    """
    length = model.context_length if length is None else length
    passes = layer_passes(model, length, execution)
    d, heads = model.d_model, model.num_heads * model.head_dim
    per_token = 2 * (2 * d * heads + 3 * d * model.d_ff)
    per_key = 2 * 2 * d * model.num_kv_heads * model.head_dim
    shared = passes[1:-1] if model.recursion.has_middle else passes
    lora_token, lora_key = _lora_flops(model)
    return {
        "block": float(
            sum(p.layers * (p.computed * per_token + p.projected * per_key) for p in passes)
            + sum(p.layers * (p.computed * lora_token + p.projected * lora_key) for p in shared)
            + (length * per_key // 2 if model.parts.value_residual else 0)  # the first layer's values, once more
        ),
        "attention": sum(p.layers * 4 * heads * _attention_pairs(p, attention) for p in passes),
        "router": float(_router_flops(model, length, execution)),
        "head": 2.0 * length * d * model.vocab_size,
    }


def _lora_flops(model: ModelConfig) -> tuple[int, int]:
    """FLOPs of one layer's low-rank updates: per token computed, and per token that projects keys and values."""
    targets = model.recursion.relaxation.lora_targets
    of_keys: list[LoraTarget] = [target for target in targets if target == "key_value"]
    of_tokens: list[LoraTarget] = [target for target in targets if target != "key_value"]
    return 2 * _lora_weights(model, of_tokens), 2 * _lora_weights(model, of_keys)


def _router_flops(model: ModelConfig, length: int, execution: Execution) -> int:
    routing, recursions = model.routing, model.recursion.num_recursions
    if routing.kind == "none":
        return 0
    if routing.kind == "token":
        return 2 * _router_weights(model) * length
    scored = (length, *routed_tokens(model, length)[:-1])
    tokens = length * recursions if execution == "scan" else sum(scored)
    return 2 * _router_weights(model) * (_num_routers(model) // recursions) * tokens


def train_flops(
    model: ModelConfig,
    length: int | None = None,
    *,
    execution: Execution = "gather",
    attention: AttentionWork = "causal",
) -> dict[str, float]:
    """Count the matrix products of one row's forward and backward pass: ``forward_flops``, three times each.

    With ``attention="flash"`` the backward pass makes the scores again: 7 products where the others have 6.
    """
    parts = forward_flops(model, length, execution=execution, attention=attention)
    factors = {name: 3.5 if name == "attention" and attention == "flash" else 3.0 for name in parts}
    return {name: factors[name] * flops for name, flops in parts.items()}


def train_flops_per_token(model: ModelConfig, length: int | None = None) -> float:
    """Return the exact training FLOPs per token that MFU is measured by: causal attention, no rematerialisation."""
    length = model.context_length if length is None else length
    return sum(train_flops(model, length).values()) / length


def run_flops(config: Config, start: int = 0, end: int | None = None) -> float:
    """Return the exact training FLOPs of a run: those of every step by the model that its stage of growth trains.

    Args:
        config: of the run.
        start: 0-based first step that counts.
        end: the step after the last one; None is the end of the run.
    """
    tokens, last = config.train.batch_size * config.model.context_length, config.train.steps if end is None else end
    steps = ((max(0, min(stage.end, last) - max(stage.start, start)), stage.model) for stage in config.stages)
    return sum(count * tokens * train_flops_per_token(model) for count, model in steps if count)


def kv_bytes_per_token(
    model: ModelConfig, reaching: tuple[float, ...] | None = None, *, bytes_per_value: int = 2
) -> float:
    """Return the bytes of key/value cache per token of text (paper table 2).

    Args:
        model: the model.
        reaching: share of the tokens that reach each recursion; None takes the capacities.
        bytes_per_value: 2 for bfloat16.
    """
    shares = model.capacities if reaching is None else reaching
    recursion = model.recursion
    per_layer = 2 * model.num_kv_heads * model.head_dim * bytes_per_value
    copies = 1.0 if recursion.kv_strategy == "shared" else float(sum(shares))
    return per_layer * ((2 if recursion.has_middle else 0) + model.block_depth * copies)

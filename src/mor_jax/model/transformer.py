"""The whole trunk: embed -> first -> shared block, N_r times -> last -> norm; the head is applied by the loss.

Paper section 2.1 and figure 1. One parameter tree whatever the execution: block parameters stacked [L, ...], routers
and unshared norms stacked [R, ...].
"""

from collections.abc import Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.array_types import Params
from mor_jax.config import PLAIN, Mode, ModelConfig, ResolvedPerf
from mor_jax.errors import require
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.kernels.embedding import look_up
from mor_jax.kernels.gradients import gradients_together
from mor_jax.mesh.axes import axis_size, constrain, whole_width, without_mesh
from mor_jax.model.decoder_layer import remat_layer
from mor_jax.model.layer_context import LayerContext
from mor_jax.model.layers import RMSNorm, normal_init
from mor_jax.model.modern_parts import first_values
from mor_jax.model.parameters import Weights, compute_copy, fill_tiles, from_tree, to_tree
from mor_jax.model.recurse import make_context, recurse, recurse_scan
from mor_jax.model.relaxation import collect_unshared
from mor_jax.model.routing.boundaries import boundaries_of, boundary_refusal
from mor_jax.model.routing.capacity import warmup_steps
from mor_jax.model.routing.decide import RoutingInputs
from mor_jax.model.routing.gather import expert_gather, token_gather
from mor_jax.model.routing.router import Router
from mor_jax.model.routing.scan import expert_scan, token_scan
from mor_jax.model.routing.trace import RoutingTrace
from mor_jax.model.rows import Rows


@struct.dataclass
class Stages:
    """Hidden states on the way, for parity checks and analysis: float [B, T, D] each."""

    first: jax.Array | None
    """After the unique first layer (middle_* only)."""
    recursions: tuple[jax.Array, ...]
    """After each recursion (after each repeated layer group for sequence sharing)."""
    last: jax.Array | None
    """After the unique last layer (middle_* only)."""
    norm: jax.Array
    """After the final norm."""


@struct.dataclass
class TrunkOutput:
    """Result of the trunk: everything before the output head."""

    hidden_BTD: jax.Array
    """After the final norm, in the compute dtype."""
    trace: RoutingTrace | None
    """None for models without a router."""
    stages: Stages | None = None
    """Present when asked for."""


class Transformer(nn.Module):
    """Decoder-only trunk with parameter sharing and routing; see `apply_trunk` for what it is given."""

    config: ModelConfig
    perf: ResolvedPerf = PLAIN
    mode: Mode = "topk"
    return_stages: bool = False

    @nn.compact
    def __call__(
        self,
        rows: Rows,
        *,
        router_bias_R: jax.Array | None = None,
        boundaries_R: jax.Array | None = None,
        max_depth: jax.Array | None = None,
        step: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> TrunkOutput:
        """Compute hidden states after the final norm."""
        config = self.config
        # small, and whole under `context`
        rows = jax.tree.map(lambda values_BT: constrain(values_BT, "batch", None), rows)
        embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(_embed_init(config), ("vocab", "embed")),
            (config.vocab_size, config.d_model),
        )
        with jax.named_scope("embed"):
            table_VD = constrain(embedding, "vocab", None)  # moves the table, which is smaller than the hidden states
            x_BTD = look_up(table_VD, constrain(rows.tokens_BT, "batch", "sequence"))
            x_BTD = constrain(x_BTD.astype(config.dtype), "batch", "sequence", None)
        view = rows.view(config)
        layer, context = remat_layer(self.perf, loops=0), make_context(config, view)
        first = last = trace = None
        unshared = self._unshared()
        if config.recursion.has_middle:
            first = x_BTD = layer(config, self.perf, name="first")(x_BTD, context, None, None)[0]
        if config.routing.kind == "none":
            x_BTD, recursions = self._recursions(x_BTD, view, unshared)
        else:
            inputs = RoutingInputs(
                view=view,
                router=Router(config, name="router")(),
                aux_router=Router(config, name="aux_router")() if config.routing.has_aux_router else None,
                counted_BT=rows.counted_BT,
                unshared=unshared,
                boundary_R=boundaries_of(config, boundaries_R) if config.routing.kind == "expert" else None,
                bias_R=router_bias_R if config.routing.is_loss_free else None,
                max_depth=max_depth,
                noise_RBT=_noise(config, key, x_BTD) if config.routing.random else None,
                step=step,
                slot_multiple=self.perf.slot_multiple,
            )
            x_BTD, trace, recursions = self._routed_recursions(x_BTD, inputs)
        if config.recursion.has_middle:
            last = x_BTD = self._last(layer, x_BTD, context)
        hidden_BTD = self._final_norm(x_BTD)
        if not config.tie_embeddings:
            self.param("head", normal_init(config, "embed", "vocab"), (config.d_model, config.vocab_size))
        stages = Stages(first=first, recursions=tuple(recursions), last=last, norm=hidden_BTD)
        return TrunkOutput(hidden_BTD=hidden_BTD, trace=trace, stages=stages if self.return_stages else None)

    def _last(self, layer: Any, x_BTD: jax.Array, context: LayerContext) -> jax.Array:
        """Apply the last layer; where memory counts, its backward pass ends before that of the recursions begins."""
        if self.is_initializing() or self.perf.remat == "none":
            return layer(self.config, self.perf, name="last")(x_BTD, context, None, None)[0]
        own, x_BTD = gradients_together(self.variables["params"]["last"], x_BTD)
        if _gathers_block(self.config, self.perf):  # once, since its backward pass comes next
            own = _whole(self.config, "last", own)
        with jax.named_scope("last"):
            detached = layer(self.config, self.perf, parent=None)
            return detached.apply({"params": own}, x_BTD, context, None, None)[0]

    def _final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the final norm, in whose backward pass the same holds."""
        if self.is_initializing() or self.perf.remat == "none":
            return RMSNorm(self.config, name="final_norm")(x_BTD)[1]
        own, x_BTD = gradients_together(self.variables["params"]["final_norm"], x_BTD)
        with jax.named_scope("final_norm"):
            detached: Any = RMSNorm(self.config, parent=None)
            return detached.apply({"params": own}, x_BTD)[1]

    def _block(self) -> Any:
        """The shared block: L layers scanned over stacked parameters."""
        config = self.config
        recursion = config.recursion
        repeats, loops = (recursion.num_recursions, 1) if recursion.is_sequence else (1, recursion.num_recursions)
        scan: Any = nn.scan  # its annotation knows one axis for all arguments only
        stack = scan(
            remat_layer(self.perf, loops=loops),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            out_axes=0,
            length=config.block_depth,
            unroll=self.perf.scan_unroll or config.block_depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config, self.perf, repeats=repeats, name="block")

    def _unshared(self) -> Any:
        return collect_unshared(self.config, lambda module, name: module(self.config, name=name)())

    def _recursions(self, x_BTD: jax.Array, view: TokenView, unshared: Any) -> tuple[jax.Array, Sequence[jax.Array]]:
        """Every recursion computes every token; return the hidden states after the last, and after each."""
        config, block = self.config, self._block()
        if config.recursion.is_sequence:
            by_layer = jax.tree.map(lambda own_RLX: jnp.swapaxes(own_RLX, 0, 1), unshared)
            return block(x_BTD, make_context(config, view), None, by_layer)[0], ()
        if self.perf.execution == "scan" and config.recursion.sharing != "none":
            states = recurse_scan(config, block, x_BTD, view, unshared)
        else:
            params = None if self.is_initializing() else self.variables["params"]
            states = recurse(config, block, x_BTD, view, unshared, first_values(config, params, x_BTD))
        return states[-1], states

    def _routed_recursions(
        self, x_BTD: jax.Array, inputs: RoutingInputs
    ) -> tuple[jax.Array, RoutingTrace, Sequence[jax.Array]]:
        """The router says which tokens a recursion computes."""
        config, block, stages = self.config, self._block(), self.return_stages
        if config.routing.kind == "token":
            run = token_gather if self.perf.execution == "gather" else token_scan
            return run(config, block, x_BTD, inputs, return_stages=stages)
        if self.perf.execution == "gather" and self.mode == "topk":
            return expert_gather(config, block, x_BTD, inputs, return_stages=stages)
        return expert_scan(config, block, x_BTD, inputs, mode=self.mode, return_stages=stages)


def _embed_init(config: ModelConfig) -> Any:
    return nn.initializers.normal(config.init_std)


def _noise(config: ModelConfig, key: jax.Array | None, x_BTD: jax.Array) -> jax.Array:
    key = jax.random.key(0) if key is None else key
    return jax.random.uniform(key, (config.recursion.num_recursions, *x_BTD.shape[:2]))


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    rows = Rows(jnp.zeros((1, 8), jnp.int32))
    with without_mesh():  # it would have to divide these tokens
        return to_tree(Transformer(config, parent=None).init(key, rows))


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters, N(0, init_std) for matrices and 1 for norms (paper appendix B).

    Args:
        config: the model.
        key: random key.

    Returns:
        The parameter tree of the module docstring; free of side effects and jittable.
    """
    return nn.meta.unbox(_init_boxed(config, key))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Logical axis names of every parameter: the same tree with tuples of names (or None) as leaves."""
    boxed = jax.eval_shape(lambda key: _init_boxed(config, key), jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def _gathers_block(config: ModelConfig, perf: ResolvedPerf) -> bool:
    """Whether what several recursions use is gathered once for all of them."""
    return perf.whole_block and config.recursion.repeats_block and axis_size("fsdp") > 1


def _whole(config: ModelConfig, name: str, params: Params) -> Params:
    """Gather the width of a part of the parameter tree."""
    axes = logical_axes(config)[name]
    return jax.tree.map(lambda weight, names: whole_width(weight, *names), params, axes)


def apply_trunk(
    weights: Weights,
    perf: ResolvedPerf,
    rows: Rows,
    *,
    mode: Mode = "topk",
    step: int | jax.Array | None = None,
    key: jax.Array | None = None,
    return_stages: bool = False,
) -> TrunkOutput:
    """Run the trunk. Differentiable in the parameters.

    Args:
        weights: the model, with parameters as of `init_params`.
        perf: how to execute it. `threshold` of expert-choice has no static capacity and always runs as `scan`.
        rows: of tokens.
        mode: expert-choice selection: `topk` looks ahead along the sequence, `threshold` is causal.
        step: 0-based optimiser step, for the warm-ups of capacity and balance; None is after them. `gather` takes an
            int, `scan` also a traced int32.
        key: random key of a random router; None is a fixed one.
        return_stages: whether to return the hidden states on the way.

    Returns:
        Hidden states, routing trace (None without a router), stages.

    Raises:
        UserError: `threshold` for a recipe without a boundary, or a traced step under `gather` during a warm-up.
    """
    config = weights.config
    require(mode in get_args(Mode), f"mode={mode!r} is not one of {', '.join(map(repr, get_args(Mode)))}")
    if mode == "threshold":
        refusal = boundary_refusal(config, weights.boundaries_R)
        require(refusal is None, f"mode='threshold' needs a boundary: {refusal}")
    if warmup_steps(config) == 0:
        step = None
    require(
        step is None or isinstance(step, int) or perf.execution == "scan",
        "step is traced, but perf.execution='gather' needs the static shapes that a concrete step gives",
    )
    params = compute_copy(config, weights.params)
    if _gathers_block(config, perf):
        params = {**params, "block": _whole(config, "block", params["block"])}
    variables = from_tree(fill_tiles(params))
    trunk = Transformer(config, perf, mode, return_stages)
    state = {name: getattr(weights, name) for name in ("router_bias_R", "boundaries_R", "max_depth")}
    output = trunk.apply(variables, rows, **state, step=step, key=key)
    assert isinstance(output, TrunkOutput)
    return output

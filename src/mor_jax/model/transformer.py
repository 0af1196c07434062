"""The whole trunk: embed -> first -> shared block, N_r times -> last -> norm; the head is applied by the loss.

Paper section 2.1 and figure 1. One parameter tree whatever the execution: block parameters stacked [L, ...], routers
and unshared norms stacked [R, ...].
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig, PerfConfig
from mor_jax.errors import require
from mor_jax.kernels.attention.mask import TokenView
from mor_jax.mesh.axes import axis_size, constrain, whole_width, without_mesh
from mor_jax.model.decoder_layer import StackedNorms, remat_layer
from mor_jax.model.layers import RMSNorm, normal_init
from mor_jax.model.parameters import compute_copy, from_tree, to_tree
from mor_jax.model.recurse import RoutingInputs, make_context, recurse, recurse_scan
from mor_jax.model.relaxation import Encoding, StackedLora
from mor_jax.model.routing.gather import expert_gather, token_gather
from mor_jax.model.routing.router import Router, has_boundary
from mor_jax.model.routing.scan import expert_scan, token_scan
from mor_jax.model.routing.trace import RoutingTrace, Stages, TrunkOutput

Mode = Literal["topk", "threshold"]


class Transformer(nn.Module):
    """Decoder-only trunk with parameter sharing and routing."""

    config: ModelConfig
    perf: PerfConfig = PerfConfig()

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        mode: Mode = "topk",
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        attention_mask_BT: jax.Array | None = None,
        step: int | jax.Array | None = None,
        router_bias_R: jax.Array | None = None,
        key: jax.Array | None = None,
        return_stages: bool = False,
    ) -> TrunkOutput:
        """Compute hidden states after the final norm; see `apply_trunk` for the arguments."""
        config = self.config
        # small, and whole under `context`
        tokens_BT, (positions_BT, segment_ids_BT, attention_mask_BT) = jax.tree.map(
            lambda rows_BT: constrain(rows_BT, "batch", None),
            (tokens_BT, (positions_BT, segment_ids_BT, attention_mask_BT)),
        )
        view = self._view(tokens_BT, positions_BT, segment_ids_BT, attention_mask_BT)
        counted_BT = jnp.ones(tokens_BT.shape, bool) if segment_ids_BT is None else segment_ids_BT > 0
        embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(_embed_init(config), ("vocab", "embed")),
            (config.vocab_size, config.d_model),
        )
        with jax.named_scope("embed"):
            table_VD = constrain(embedding, "vocab", None)  # moves the table, which is smaller than the hidden states
            x_BTD = jnp.take(table_VD, constrain(tokens_BT, "batch", "sequence"), axis=0, mode="clip")
            x_BTD = constrain(x_BTD.astype(config.dtype), "batch", "sequence", None)
        layer, context = remat_layer(self.perf, in_loop=False), make_context(config, view)
        first = last = None
        if config.recursion.has_middle:
            first = x_BTD = layer(config, self.perf, name="first")(x_BTD, context, None, None)[0]
        x_BTD, trace, recursions = self._recursions(
            x_BTD, view, counted_BT, mode, step, router_bias_R, key, return_stages
        )
        if config.recursion.has_middle:
            last = x_BTD = layer(config, self.perf, name="last")(x_BTD, context, None, None)[0]
        _, hidden_BTD = RMSNorm(config, name="final_norm")(x_BTD)
        if not config.tie_embeddings:
            self.param("head", normal_init(config, "embed", "vocab"), (config.d_model, config.vocab_size))
        stages = Stages(first=first, recursions=tuple(recursions), last=last, norm=hidden_BTD)
        return TrunkOutput(hidden_BTD=hidden_BTD, trace=trace, stages=stages if return_stages else None)

    def _view(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None,
        segment_ids_BT: jax.Array | None,
        attention_mask_BT: jax.Array | None,
    ) -> TokenView:
        rows_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        rows_BT = constrain(rows_BT, "batch", None)
        return TokenView(
            rows_BC=rows_BT,
            positions_BC=rows_BT if positions_BT is None else positions_BT,
            segments_BC=None if self.config.attend_across_documents else segment_ids_BT,
            valid_BC=None if attention_mask_BT is None else attention_mask_BT.astype(bool),
        )

    def _block(self) -> Any:
        """The shared block: L layers scanned over stacked parameters."""
        config = self.config
        scan: Any = nn.scan  # its annotation knows one axis for all arguments only
        stack = scan(
            remat_layer(self.perf, in_loop=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            out_axes=0,
            length=config.block_depth,
            unroll=config.block_depth if self.perf.scan_unroll == 0 else self.perf.scan_unroll or 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        repeats = config.recursion.num_recursions if config.recursion.is_sequence else 1
        return stack(config, self.perf, repeats=repeats, name="block")

    def _unshared(self) -> Any:
        """What the recursions do not share, leaves [R, L, ...]; None if they share everything."""
        config, relaxation = self.config, self.config.recursion.relaxation
        own: dict[str, Any] = {}
        if not config.recursion.share_norms:
            own |= StackedNorms(config, name="block_norms")()
        if relaxation.lora_rank:
            own["lora"] = StackedLora(config, name="lora")()
        if relaxation.encoding:  # multiplies the output of the block, so it is one for all layers but the last
            scale_RD = Encoding(config, name="encoding")()
            widths = ((0, 0), (config.block_depth - 1, 0), (0, 0))
            own["encoding"] = jnp.pad(scale_RD[:, None], widths, constant_values=1.0)
        return own or None

    def _recursions(
        self,
        x_BTD: jax.Array,
        view: TokenView,
        counted_BT: jax.Array,
        mode: Mode,
        step: int | jax.Array | None,
        router_bias_R: jax.Array | None,
        key: jax.Array | None,
        return_stages: bool,
    ) -> tuple[jax.Array, RoutingTrace | None, Any]:
        config, block = self.config, self._block()
        norms = self._unshared()
        if config.recursion.is_sequence:
            by_layer = jax.tree.map(lambda s_RLD: jnp.swapaxes(s_RLD, 0, 1), norms)
            return block(x_BTD, make_context(config, view), None, by_layer)[0], None, ()
        if config.routing.kind == "none":
            run = recurse_scan if self.perf.execution == "scan" and config.recursion.sharing != "none" else recurse
            states = run(config, block, x_BTD, view, norms)
            return states[-1], None, states
        routing = config.routing
        inputs = RoutingInputs(
            view=view,
            router=Router(config, name="router")(),
            aux_router=Router(config, name="aux_router")() if _has_aux_router(config) else None,
            counted_BT=counted_BT,
            norms=norms,
            bias_R=router_bias_R if routing.kind == "token" and routing.balancing == "loss_free" else None,
            noise_RBT=_noise(config, key, x_BTD) if routing.random else None,
            step=step,
            slot_multiple=self.perf.slot_multiple or 1,
        )
        if routing.kind == "token":
            run = token_gather if self.perf.execution == "gather" else token_scan
            return run(config, block, x_BTD, inputs, return_stages=return_stages)
        if self.perf.execution == "gather" and mode == "topk":
            return expert_gather(config, block, x_BTD, inputs, return_stages=return_stages)
        return expert_scan(config, block, x_BTD, inputs, mode=mode, return_stages=return_stages)


def _embed_init(config: ModelConfig) -> Any:
    return nn.initializers.normal(config.init_std)


def _has_aux_router(config: ModelConfig) -> bool:
    return config.routing.kind == "expert" and config.routing.sampling == "aux_router"


def _noise(config: ModelConfig, key: jax.Array | None, x_BTD: jax.Array) -> jax.Array:
    key = jax.random.key(0) if key is None else key
    return jax.random.uniform(key, (config.recursion.num_recursions, *x_BTD.shape[:2]))


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    tokens_BT = jnp.zeros((1, 8), jnp.int32)
    with without_mesh():  # it would have to divide these tokens
        return to_tree(Transformer(config).init(key, tokens_BT))


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


def _gather_block(config: ModelConfig, perf: PerfConfig, params: Params) -> Params:
    """Gather what several recursions use once for all of them, unless `perf` says otherwise."""
    if perf.whole_block is False or not config.recursion.repeats_block or axis_size("fsdp") == 1:
        return params
    axes = logical_axes(config)["block"]
    return {**params, "block": jax.tree.map(lambda w, names: whole_width(w, *names), params["block"], axes)}


def apply_trunk(
    config: ModelConfig,
    perf: PerfConfig,
    params: Params,
    tokens_BT: jax.Array,
    *,
    mode: Mode = "topk",
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    attention_mask_BT: jax.Array | None = None,
    step: int | jax.Array | None = None,
    router_bias_R: jax.Array | None = None,
    key: jax.Array | None = None,
    return_stages: bool = False,
) -> TrunkOutput:
    """Run the trunk on parameters from `init_params`.

    Args:
        config: the model.
        perf: how to execute it. `threshold` of expert-choice has no static capacity and always runs as `scan`.
        params: parameter tree; differentiable.
        tokens_BT: int32 token ids.
        mode: expert-choice selection: `topk` looks ahead along the sequence, `threshold` is causal.
        positions_BT: int32 rotary positions; default 0..T-1.
        segment_ids_BT: int32 document numbers from 1; 0 is padding, which stands last in its row, takes no seat and
            counts nowhere. Attention respects them unless `attend_across_documents`.
        attention_mask_BT: bool; tokens that nothing may attend to, although they route like others (as released).
        step: 0-based optimiser step, for the warm-ups of capacity and balance; None is after them. `gather` takes an
            int, `scan` also a traced int32.
        router_bias_R: float32 bias of loss-free balancing.
        key: random key of a random router; None is a fixed one.
        return_stages: whether to return the hidden states on the way.

    Returns:
        Hidden states, routing trace (None without a router), stages.

    Raises:
        UserError: `threshold` for a recipe without a boundary, or a traced step under `gather` during a warm-up.
    """
    require(mode in ("topk", "threshold"), f"mode={mode!r} is not one of 'topk', 'threshold'")
    routing = config.routing
    if mode == "threshold":
        require(
            has_boundary(config),
            f"mode='threshold' needs a boundary: routing.sampling={routing.sampling!r}, random={routing.random} trains "
            f"none and routing.boundaries is not calibrated",
        )
    warms_up = routing.capacity_warmup_steps if routing.kind == "expert" else routing.balance_warmup_steps
    if not warms_up or routing.kind == "none":
        step = None
    require(
        step is None or isinstance(step, int) or perf.execution == "scan",
        "step is traced, but perf.execution='gather' needs the static shapes that a concrete step gives",
    )
    variables = from_tree(_gather_block(config, perf, compute_copy(config, params)))
    output = Transformer(config, perf).apply(
        variables,
        tokens_BT,
        mode=mode,
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        attention_mask_BT=attention_mask_BT,
        step=step,
        router_bias_R=router_bias_R,
        key=key,
        return_stages=return_stages,
    )
    assert isinstance(output, TrunkOutput)
    return output

"""The pure training step: gradient accumulation, optimiser, loss-free router bias, running boundaries.

Letters: A micro-batches, B rows of the whole batch, T positions, R recursions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mor_jax.array_types import Params
from mor_jax.config import Config, ModelConfig, ResolvedPerf, Stage
from mor_jax.errors import UserError, require
from mor_jax.mesh.axes import constrain
from mor_jax.mesh.mesh import batch_sharding, replicated
from mor_jax.model.cut import cut_params, zero_unused
from mor_jax.model.routing.boundaries import follow, printable, score_cut
from mor_jax.model.routing.losses import RoutingStatistics
from mor_jax.model.transformer import logical_axes
from mor_jax.perf import compiler_options, resolve_perf
from mor_jax.runs.optimizer import make_optimizer, make_schedule
from mor_jax.runs.state import TrainState, abstract_train_state
from mor_jax.train.objective import ARRAYS, Batch, LossParts, count_targets, loss_fn

Metrics = dict[str, jax.Array]
OPTIMIZER_SCOPE = "optimiser"
"""Part of the name of every operation of the update in a compiled step."""


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Split [B, ...] into [A, B / A, ...]: every A-th row, so that each device keeps the rows it has."""
    return {name: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1) for name, x in batch.items()}


def _gradients(
    config: Config, whole: ModelConfig, perf: ResolvedPerf, state: TrainState, batch: Batch, step: jax.Array | None
) -> tuple[Params, LossParts]:
    """Differentiate the loss of the whole batch, one micro-batch at a time.

    ``config`` is the stage's; the gradients are a tree of the ``whole`` model's, zero where the stage has nothing.
    """
    count = config.train.accumulation
    targets = count_targets(config, batch)
    step_key = jax.random.fold_in(state.key, state.step)
    axes_of_params = logical_axes(whole)

    def differentiate(index: jax.Array, rows: Batch) -> tuple[Params, LossParts]:
        def loss(params: Params) -> tuple[jax.Array, LossParts]:
            key = jax.random.fold_in(step_key, index)
            how: dict[str, Any] = {"perf": perf, "targets": targets, "micro_batches": count}
            params, bias_R = cut_params(whole, config.model, params), state.router_bias_R
            return loss_fn(config, params, bias_R, rows, key, step, boundaries_R=state.boundaries_R, **how)

        gradients, parts = jax.grad(loss, has_aux=True)(state.params)
        return jax.tree.map(lambda g, axes: constrain(g, *axes), gradients, axes_of_params), parts

    if count == 1:
        return differentiate(jnp.zeros((), jnp.int32), batch)

    def parts_of(inputs: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array | None]:
        gradients, parts = differentiate(*inputs)
        return (gradients, dataclasses.replace(parts, scores_RBT=None)), parts.scores_RBT

    def add(sums: Any, inputs: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array | None]:
        summands, scores_RBT = parts_of(inputs)
        return jax.tree.map(jnp.add, sums, summands), scores_RBT

    inputs = (jnp.arange(count), _micro_batches(batch, count))
    first = jax.tree.map(lambda x: x[0], inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(parts_of, first)[0])
    (gradients, parts), scores_ARBT = jax.lax.scan(add, zeros, inputs)
    if scores_ARBT is None:
        return gradients, parts
    return gradients, dataclasses.replace(parts, scores_RBT=jnp.moveaxis(scores_ARBT, 0, 1))


def _update_bias(
    config: Config, state: TrainState, routed_step: jax.Array, statistics: RoutingStatistics | None
) -> jax.Array:
    """Loss-free balancing: move every depth's bias by u towards the mean load of the global batch (table 14)."""
    routing = config.model.routing
    if statistics is None or not routing.is_loss_free:
        return state.router_bias_R
    load_R = statistics.load_R
    moved_R = state.router_bias_R + routing.bias_update_rate * jnp.sign(jnp.mean(load_R) - load_R)
    warm = routed_step + 1 >= routing.balance_warmup_steps  # before, no router chose the depths
    return jnp.where(warm, moved_R, state.router_bias_R)


def _follow_boundaries(state: TrainState, routed_step: jax.Array, parts: LossParts) -> jax.Array:
    """Running boundaries of expert-choice: move those of the recursions that routed towards the batch's cuts."""
    if parts.scores_RBT is None or parts.chosen_R is None:
        return state.boundaries_R
    recursions = parts.chosen_R.shape[0]
    cut_R = score_cut(parts.scores_RBT, parts.chosen_R)
    return state.boundaries_R.at[:recursions].set(follow(state.boundaries_R[:recursions], cut_R, routed_step))


def train_step(
    config: Config,
    state: TrainState,
    batch: Batch,
    perf: ResolvedPerf | None = None,
    *,
    stage: Stage | None = None,
) -> tuple[TrainState, Metrics]:
    """Do one optimiser step. Pure: jit it with ``config`` closed over and ``state`` donated.

    Args:
        config: static, of the run. While a warm-up of routing runs (``train.phases``), ``perf.execution`` must be
            `scan`, whose shapes do not depend on the step.
        state: before the step.
        batch: the whole optimiser step's rows, [B, T+1]; split into ``train.accumulation`` micro-batches here.
        perf: static, from ``resolve_perf``; None is ``config.perf``, plainly where it leaves something open.
        stage: static, of ``config.stages``; None where there is one only. What its model has no part of - routers,
            parameters of later passes - keeps its values, and moments of zero.

    Returns:
        (state after the step, metrics as float32 scalars or [R] and [R+1] arrays).

    Raises:
        UserError: no stage, where ``train.growth`` makes several.
    """
    require(stage is not None or not config.train.growth, "a step of a run with train.growth needs its stage")
    stage = stage or config.stages[-1]
    own, perf = config.of_stage(stage), config.perf.resolved() if perf is None else perf
    routed_step = state.step - stage.routed_from
    step = routed_step if perf.execution == "scan" else None
    gradients, parts = _gradients(own, config.model, perf, state, batch, step)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.named_scope(OPTIMIZER_SCOPE):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        updates = zero_unused(config.model, own.model, updates)  # weight decay would shrink what waits
        params = optax.apply_updates(state.params, updates)
    metrics: Metrics = {
        "loss": parts.lm,
        "total_loss": parts.total,
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(params),
        "learning_rate": make_schedule(config.optimizer, config.train.steps)(state.step),
        "target_tokens": count_targets(config, batch),
    }
    if config.train.logit_z_loss:
        metrics["logit_z"] = parts.logit_z
    if parts.losses is not None and parts.statistics is not None:
        metrics |= {f"{name}_loss": value for name, value in vars(parts.losses).items()}
        metrics |= vars(parts.statistics)
    boundaries_R = _follow_boundaries(state, routed_step, parts)
    if own.model.routing.keeps_boundaries:
        metrics["boundaries_R"] = printable(own.model, boundaries_R[: own.model.recursion.num_recursions])
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        router_bias_R=_update_bias(own, state, routed_step, parts.statistics),
        boundaries_R=boundaries_R,
    )
    return new_state, metrics


def compile_train_step(
    config: Config, mesh: Mesh, stage: Stage | None = None, arrays: Sequence[str] = ARRAYS
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile ``train_step`` ahead of time for a mesh; the state's buffers are donated.

    Args:
        config: of the run; what its `perf` leaves open is chosen here.
        mesh: from ``make_mesh``.
        stage: of ``config.stages``; None is the last, which trains the model as configured.
        arrays: of the batches, from ``step_arrays``.

    Returns:
        The executable: (state, batch) -> (state, metrics).

    Raises:
        UserError: the mesh does not divide the batch or the model, or the compiler refuses ``perf.compiler_options``.
    """
    stage = stage or config.stages[-1]
    perf = resolve_perf(config.of_stage(stage), mesh)
    state = abstract_train_state(config, mesh)
    shape = (config.train.batch_size, config.model.context_length + 1)
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(arrays, array)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        lambda state, batch: train_step(config, state, batch, perf, stage=stage),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated(mesh)),
    )
    options = compiler_options(perf)
    with jax.set_mesh(mesh):  # what `constrain` and `shard_map` refer to
        lowered = step.lower(state, batch)
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            refused = options and "INVALID_ARGUMENT" in str(error) and "option" in str(error)
            if not refused:
                raise
            raise UserError(f"perf.compiler_options={perf.compiler_options}: {error}") from error

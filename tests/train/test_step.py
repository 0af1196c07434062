"""The training step: accumulation, what each loss reaches, the loss-free bias, and one compilation for many steps."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_batch, tiny_config, with_train

from mor_jax.config import Config, MeshConfig, PerfConfig, ResolvedPerf, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk
from mor_jax.runs.state import TrainState, init_train_state
from mor_jax.train.objective import count_targets, loss_fn, step_arrays
from mor_jax.train.step import compile_train_step, train_step

EXPERT, FREE = RoutingConfig(kind="expert"), RoutingConfig(kind="token", balancing="loss_free", score="softmax")


def _state(config: Config) -> TrainState:
    return init_train_state(config, make_mesh(config.mesh, jax.devices()[:1]))


def _run(config: Config, steps: int = 1) -> tuple[TrainState, Any]:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, metrics = init_train_state(config, mesh), {}
    executable = compile_train_step(config, mesh)
    for step in range(steps):
        state, metrics = executable(state, shard_batch(mesh, make_batch(config, step)))
    return state, jax.device_get(metrics)


def _assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.parametrize("routing", [RoutingConfig(), EXPERT, FREE], ids=["none", "expert", "loss_free"])
def test_accumulation_equals_the_big_batch(routing):
    """Rows without padding, so that every row has as many active tokens; documents differ from row to row."""
    config = dataclasses.replace(tiny_config(routing=routing), perf=PerfConfig(loss_chunk=16, execution="scan"))
    batch = {name: jnp.asarray(x) for name, x in make_batch(config).items()}
    batch["segment_ids"] = jnp.maximum(batch["segment_ids"], 1)
    state = _state(config)

    @jax.jit
    def both(state: TrainState, batch: Any) -> Any:
        split = with_train(config, accumulation=4)
        return train_step(config, state, batch), train_step(split, state, batch)

    (big, big_metrics), (small, small_metrics) = both(state, batch)
    for name in ("loss", "total_loss", "grad_norm", "target_tokens"):
        np.testing.assert_allclose(big_metrics[name], small_metrics[name], rtol=1e-5)
    moments = [jax.tree.leaves(s.opt_state) for s in (big, small)]
    _assert_close(*moments, tolerance=1e-6)
    np.testing.assert_array_equal(big.router_bias_R, small.router_bias_R)
    np.testing.assert_allclose(big.boundaries_R, small.boundaries_R, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_counted_targets_of_all_rows():
    config = tiny_config(routing=RoutingConfig())
    batch = {name: jnp.asarray(x) for name, x in make_batch(config).items()}
    segments = np.asarray(batch["segment_ids"])
    wanted = int(np.sum((segments[:, 1:] != 0) & (segments[:, 1:] == segments[:, :-1])))
    assert int(count_targets(config, batch)) == wanted
    params, key = _state(config).params, jax.random.key(0)
    bias_R = jnp.zeros(2)
    compute = jax.jit(lambda batch: loss_fn(config, params, bias_R, batch, key, None)[1])
    parts = compute(batch)
    changed = dict(batch)
    changed["tokens"] = jnp.where(batch["segment_ids"] == 0, 5, batch["tokens"])  # what padding holds must not matter
    again = compute(changed)
    np.testing.assert_allclose(parts.lm, again.lm, rtol=1e-6)
    assert abs(float(parts.lm) - np.log(64)) < 0.1


def test_the_auxiliary_router_loss_reaches_only_the_auxiliary_router():
    config = tiny_config(routing=RoutingConfig(kind="expert", sampling="aux_router"))
    state, batch = _state(config), {name: jnp.asarray(x) for name, x in make_batch(config).items()}

    def loss(params: Any, with_aux: bool) -> jax.Array:
        value, parts = loss_fn(config, params, state.router_bias_R, batch, state.key, None)
        return value if with_aux else parts.total

    trained, plain = (jax.jit(jax.grad(lambda p, w=w: loss(p, w)))(state.params) for w in (True, False))
    assert float(jnp.max(jnp.abs(trained["aux_router"]["kernel"]))) > 0
    assert float(jnp.max(jnp.abs(plain["aux_router"]["kernel"]))) == 0
    others = [{k: v for k, v in tree.items() if k != "aux_router"} for tree in (trained, plain)]
    _assert_close(*others, tolerance=1e-7)


def test_the_loss_free_bias_moves_against_the_load():
    state, metrics = _run(tiny_config(routing=FREE))
    load_R = metrics["load_R"]
    np.testing.assert_allclose(state.router_bias_R, 0.001 * np.sign(load_R.mean() - load_R), atol=1e-9)
    assert np.any(np.asarray(state.router_bias_R) != 0)


def test_the_running_boundary_is_the_cut_of_the_whole_batch():
    """Half of each row's tokens are chosen, padding last: the score between them and the rest, over all rows."""
    config = dataclasses.replace(tiny_config(routing=EXPERT), perf=PerfConfig(loss_chunk=16, execution="scan"))
    state, batch = _state(config), {name: jnp.asarray(x) for name, x in make_batch(config).items()}
    weights = Weights(config.model, state.params)
    trace: Any = jax.jit(lambda: apply_trunk(weights, ResolvedPerf(execution="scan"), Rows.of_batch(batch)).trace)()
    counted_BT = np.asarray(batch["segment_ids"][:, :-1]) > 0
    scores = np.sort(np.asarray(trace.scores_RBT)[1][counted_BT])[::-1]
    chosen = int(np.minimum(counted_BT.sum(axis=1), 16).sum())
    assert chosen < counted_BT.sum()
    new, metrics = jax.jit(lambda state: train_step(config, state, batch))(state)
    wanted = (scores[chosen - 1] + scores[chosen]) / 2
    np.testing.assert_allclose(new.boundaries_R, [-np.inf, wanted], rtol=1e-4)
    np.testing.assert_allclose(metrics["boundaries_R"], [0.0, wanted], rtol=1e-4)


def test_one_compilation_serves_many_steps_and_the_loss_falls():
    config = with_train(tiny_config(), steps=20)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda s, b: train_step(config, s, b), n=1), donate_argnums=0)
    state, losses = init_train_state(config, mesh), []
    for index in range(4):
        state, metrics = step(state, shard_batch(mesh, make_batch(config, index)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 4


def test_the_logit_z_loss_is_reported_and_added():
    config = with_train(tiny_config(routing=RoutingConfig()), logit_z_loss=0.01)
    _, metrics = _run(config)
    assert metrics["logit_z"] > 10  # near log(64) squared
    np.testing.assert_allclose(metrics["total_loss"], metrics["loss"] + 0.01 * metrics["logit_z"], rtol=1e-6)


def test_options_that_the_compiler_refuses_are_named():
    config = tiny_config(routing=RoutingConfig())
    perf = dataclasses.replace(config.perf, compiler_options=("xla_nope=1",))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(UserError, match=r"perf.compiler_options=\('xla_nope=1',\): .*No such compile option"):
        compile_train_step(dataclasses.replace(config, perf=perf), mesh)


def test_labels_say_what_is_predicted_and_where():
    """Of the loss, its share per token and its gradient, on two devices and in two micro-batches; without a router."""
    config = with_train(tiny_config(routing=RoutingConfig()), batch_size=4, accumulation=2)
    batch = make_batch(config)
    other = (np.asarray(batch["tokens"]) + 1) % config.model.vocab_size
    labels = other.copy()
    labels[2:] = -100  # whole rows, so that the loss is that of the others alone
    kept = {name: jnp.asarray(x[:2]) for name, x in (batch | {"labels": other}).items()}
    masked = batch | {"labels": labels, "difficulty": labels * 5}
    state = _state(config)
    expected, _ = jax.jit(lambda s: loss_fn(config, s.params, s.router_bias_R, kept, s.key, None))(state)
    arrays = step_arrays(masked)
    assert "difficulty" not in arrays
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    placed = shard_batch(mesh, {name: masked[name] for name in arrays})
    executable = compile_train_step(dataclasses.replace(config, mesh=MeshConfig(data=2)), mesh, None, arrays)
    _, metrics = executable(init_train_state(config, mesh), placed)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["target_tokens"] == count_targets(config, kept)

"""What rematerialisation keeps changes neither value nor gradient, and what is kept is not made again."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import PLAIN, Execution, ModelConfig, RecursionConfig, RematPolicy, ResolvedPerf, RoutingConfig
from mor_jax.kernels import norm
from mor_jax.model import attention, layer_context
from mor_jax.model.parameters import Weights
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk, init_params

_MODEL = ModelConfig(
    vocab_size=32,
    num_layers=6,
    d_model=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    d_ff=32,
    context_length=24,
    dtype="float32",
    recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle"),
    routing=RoutingConfig(kind="expert"),
)


def _gradient(perf: ResolvedPerf) -> Any:
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 24), 0, 32)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(apply_trunk(Weights(_MODEL, params), perf, Rows(tokens_BT)).hidden_BTD ** 2)

    return jax.value_and_grad(loss)


@functools.cache
def _made(remat: RematPolicy) -> tuple[Any, int]:
    """Loss with gradients, and the matrix products of the compiled program, a loop's body counted once."""
    params = init_params(_MODEL, jax.random.key(0))
    compiled = jax.jit(_gradient(dataclasses.replace(PLAIN, remat=remat))).lower(params).compile()
    text = compiled.as_text()
    assert text is not None
    return compiled(params), text.count(" dot(")


@pytest.mark.parametrize("remat", [kind for kind in get_args(RematPolicy) if kind != "none"])
def test_no_policy_changes_value_or_gradient(remat: RematPolicy):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), _made(remat)[0], _made("none")[0])


@pytest.mark.parametrize("execution", ["gather", "scan"])
def test_sums_of_squares_beside_the_stream_change_neither(monkeypatch: pytest.MonkeyPatch, execution: Execution):
    """On a TPU every layer of a loop hands them to the next."""
    want, params = _made("none")[0], init_params(_MODEL, jax.random.key(0))
    monkeypatch.setattr(layer_context, "target_platform", lambda: "tpu")
    known, given = norm._known_sums, []

    def noted(x_BCD: jax.Array, squares_BC: jax.Array) -> jax.Array:
        given.append(squares_BC.shape)
        return known(x_BCD, squares_BC)

    monkeypatch.setattr(norm, "_known_sums", noted)
    got = jax.jit(_gradient(dataclasses.replace(PLAIN, remat="full", execution=execution)))(params)
    assert given
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), got, want)


def test_each_policy_makes_fewer_products_again_than_the_next():
    order: tuple[RematPolicy, ...] = ("none", "names", "projections", "attention", "full")
    counts = [_made(remat)[1] for remat in order]
    assert counts == sorted(set(counts)), dict(zip(order, counts, strict=True))


def _kernels(jaxpr: Any) -> int:
    """Calls of Pallas kernels in a traced program whose results are used, a loop's body counted once.

    Before jax 0.12 the trace keeps a call that remat spares; nothing reads it, and XLA drops it.
    """
    count, used = 0, {id(var) for equation in jaxpr.eqns for var in equation.invars} | set(map(id, jaxpr.outvars))
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
        if equation.primitive.name == "pallas_call":
            count += any(id(var) in used for var in equation.outvars)
        else:
            count += sum(_kernels(program) for program in inner if hasattr(program, "eqns"))
    return count


def test_a_kept_output_of_the_tpu_kernel_spares_its_second_run(monkeypatch: pytest.MonkeyPatch):
    """In four places (first, a loop per recursion, last): forward, forward again, gradient."""
    params, calls = init_params(_MODEL, jax.random.key(0)), {}
    monkeypatch.setattr(attention, "resolve_backend", lambda *_: "mosaic_tpu")  # traced only: nothing here runs it
    for remat in ("attention", "full"):
        perf = dataclasses.replace(PLAIN, remat=remat)
        calls[remat] = _kernels(jax.make_jaxpr(_gradient(perf))(params).jaxpr)
    assert calls == {"attention": 8, "full": 12}

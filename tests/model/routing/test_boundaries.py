"""Boundaries of expert-choice: the cut of a batch, what follows it, and which boundary counts, against tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.config import MeshConfig, ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.routing.boundaries import HORIZON, LOWEST, boundaries_of, boundary_refusal, follow, listed, score_cut

INF, NAN = float("inf"), float("nan")


def _model(recursions: int = 3, **changes) -> ModelConfig:
    routing = RoutingConfig(**{"kind": "expert", **changes})
    return ModelConfig(recursion=RecursionConfig(recursions, "cycle"), routing=routing)


@pytest.mark.parametrize(
    ("scores", "chosen", "cut"),
    [
        ([3.0, 1.0, 2.0, 5.0], 1, 4.0),
        ([3.0, 1.0, 2.0, 5.0], 2, 2.5),
        ([3.0, 1.0, 2.0, 5.0], 4, -INF),  # all went on
        ([-3.0, -1.0, -2.0, 5.0], 2, -1.5),
        ([-1.0, -1.0, 0.5, -4.0], 2, -1.0),  # a tie at the cut
        ([-1.0, -1.0, 0.5, -4.0], 3, -2.5),
        ([0.0, -0.0, 1e-40, -1e-40], 1, 0.0),
        ([2.0, -INF, 1.0, -INF], 1, 1.5),  # two tokens that could not be chosen
        ([2.0, -INF, 1.0, -INF], 2, -INF),
    ],
)
def test_a_cut_is_halfway_between_what_is_in_and_what_is_out(scores, chosen, cut):
    found = score_cut(jnp.array([scores]), jnp.array([chosen], jnp.int32))
    np.testing.assert_allclose(found, [cut], atol=1e-38)


def test_a_cut_is_exact_for_every_recursion_and_every_mesh():
    """Over all rows together, not row by row; the scores of each recursion on a scale of their own."""
    generator = np.random.default_rng(0)
    scores_RBT = (generator.normal(size=(3, 16, 40)) * np.array([1e-3, 1.0, 50.0])[:, None, None]).astype(np.float32)
    scores_RBT[1, 3:5] = -INF
    chosen_R = np.array([640, 300, 1], np.int32)
    ordered = [np.sort(scores.ravel())[::-1].astype(np.float64) for scores in scores_RBT]
    wanted = [-INF, *((ordered[r][k - 1] + ordered[r][k]) / 2 for r, k in ((1, 300), (2, 1)))]
    found_R = jax.jit(score_cut)(scores_RBT, chosen_R)
    np.testing.assert_allclose(found_R, wanted, rtol=1e-6)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())
    spread_RBT = jax.device_put(scores_RBT, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))
    np.testing.assert_array_equal(jax.jit(score_cut)(spread_RBT, chosen_R), found_R)


def test_running_boundaries_follow_the_cuts():
    now = jnp.array([NAN, -INF, 0.5, 0.5, -INF])
    cut = jnp.array([0.25, 0.25, -INF, 1.5, -INF])
    for step, moved in ((0, 1.5), (1, 1.0), (HORIZON - 1, 0.5 + 1 / HORIZON), (10**6, 0.5 + 1 / HORIZON)):
        np.testing.assert_allclose(follow(now, cut, jnp.int32(step)), [0.25, 0.25, 0.5, moved, -INF], rtol=1e-6)


def test_in_its_first_steps_a_running_boundary_is_the_mean_of_all_cuts():
    running_R, cuts = jnp.array([NAN]), [3.0, 1.0, 8.0, 4.0]
    for step, cut in enumerate(cuts):
        running_R = follow(running_R, jnp.array([cut]), jnp.int32(step))
    np.testing.assert_allclose(running_R, [4.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "running", "wanted"),
    [
        ({}, None, [-INF, 0.0, 0.0]),  # what the auxiliary loss trains
        ({}, [-INF, 0.25, NAN], [-INF, 0.25, 0.0]),  # recursion 3 has none yet
        ({}, [-INF, 0.25, -INF], [-INF, 0.25, -INF]),
        ({"boundaries": (0.0, 0.6, 0.7)}, [-INF, 0.25, 0.5], [-INF, 0.6, 0.7]),  # calibrated
        ({"sampling": "aux_router"}, [0.1, 0.25, 0.5], [-INF, 0.0, 0.0]),
        ({"capacities": (0.8, 0.8, 0.5)}, [0.1, 0.25, 0.5], [0.1, 0.25, 0.5]),
    ],
)
def test_a_calibrated_boundary_counts_before_a_running_one_and_that_before_zero(changes, running, wanted):
    running_R = None if running is None else jnp.array(running)
    np.testing.assert_allclose(boundaries_of(_model(**changes), running_R), wanted)


def test_a_model_of_fewer_recursions_reads_its_own():
    np.testing.assert_allclose(boundaries_of(_model(2), jnp.array([-INF, 0.25, 0.5])), [-INF, 0.25])


def test_listed_boundaries_are_numbers_that_mean_the_same():
    assert listed(_model(), jnp.array([-INF, 0.25, -INF])) == [0.0, 0.25, np.float32(LOWEST)]
    assert listed(_model(), None) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "has", "keeps"),
    [
        ({}, True, True),
        ({"sampling": "aux_router"}, True, False),  # the second router's scores decide
        ({"sampling": "none"}, False, True),
        ({"random": True}, False, False),
        ({"sampling": "none", "boundaries": (0.0, 0.1)}, True, True),
        ({"kind": "token", "score": "softmax"}, True, False),
        ({"kind": "none", "sampling": "none"}, True, False),
    ],
)
def test_which_recipes_have_a_boundary(changes, has, keeps):
    model = _model(2, **changes)
    assert model.routing.keeps_boundaries is keeps
    assert (boundary_refusal(model) is None) is has
    assert (boundary_refusal(model, jnp.zeros(2)) is None) is (has or keeps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random": True}, "model.routing.random=True selects without regard to scores"),
        ({"random": True, "boundaries": (0.0, 0.1)}, "no boundary can decide as it does"),
        ({"sampling": "none"}, "model.routing.sampling='none' trains no causal boundary"),
    ],
)
def test_what_has_no_boundary_says_why(changes, message):
    assert message in str(boundary_refusal(_model(2, **changes)))

"""The law of loss against synthetic runs whose constants are known."""

import numpy as np
import pytest

from mor_jax.errors import UserError
from mor_jax.sweep.loss_law import LawPoint, LossLaw, fit_loss_law

TRUE = LossLaw(irreducible=1.8, log_a=0.3, alpha=0.34, log_b=1.2, beta=0.3, phi=0.46)
FAMILIES = {"vanilla": (0.0, 1.0), "recursive": (0.45, 3.0), "mor": (0.45, 2.0)}
"""Share of the parameters that are shared, and mean passes."""


def _points(noise, seed=0, law=TRUE):
    generator = np.random.default_rng(seed)
    points = []
    for family, (share, passes) in FAMILIES.items():
        for budget in (1e15, 4e15, 1.6e16):
            for size in np.geomspace(0.2, 4, 5) * 3e6 * (budget / 1e15) ** 0.5:
                work = 6 * size * (1 - share + share * passes) + 1.3e7
                point = LawPoint(size * (1 - share), size * share, passes, budget / work, 0.0, family)
                loss = float(law([point])[0]) + generator.normal(0, noise)
                points.append(LawPoint(**{**vars(point), "loss": loss}))
    return points


def test_the_known_constants_are_found():
    points = _points(noise=0.0)
    found = fit_loss_law(points, samples=2)
    assert found.law.phi == pytest.approx(TRUE.phi, abs=0.002) and found.residual < 1e-4
    np.testing.assert_allclose(found.law(points), [point.loss for point in points], atol=1e-3)


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_the_interval_holds_the_true_value_of_a_pass(phi):
    law = LossLaw(**{**vars(TRUE), "phi": phi})
    found = fit_loss_law(_points(0.004, seed=3, law=law), samples=60)
    assert found.phi_band.low < phi < found.phi_band.high
    assert found.phi_band.high - found.phi_band.low < 0.3  # and says something
    assert 0.002 < found.residual < 0.006


def test_one_broken_run_does_not_bend_the_law():
    points = _points(0.002)
    points[20] = LawPoint(**{**vars(points[20]), "loss": points[20].loss + 0.5})
    assert fit_loss_law(points, samples=2).law.phi == pytest.approx(TRUE.phi, abs=0.1)


def test_what_determines_nothing_is_refused():
    points = _points(0.0)
    with pytest.raises(UserError, match="6 constants: 6 runs do not determine them"):
        fit_loss_law(points[:6])
    with pytest.raises(UserError, match="no run shares parameters"):
        fit_loss_law(points[:15])
    with pytest.raises(UserError, match="there is no plain model"):
        fit_loss_law(points[15:])

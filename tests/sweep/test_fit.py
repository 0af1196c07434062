"""IsoFLOP fits against synthetic losses whose optimum is known."""

import numpy as np
import pytest

from mor_jax.errors import UserError
from mor_jax.sweep.fit import fit_isoflop, fit_parabola, fit_path
from mor_jax.sweep.isoflop_plots import (
    pareto_front,
    plot_depth_curves,
    plot_frontiers,
    plot_isoflop,
    plot_losses,
    plot_pareto,
)

BUDGETS = (1e15, 4e15, 1.6e16)
SIZES = np.geomspace(2e6, 5e8, 7)


def _best(budget: float) -> float:
    return 0.3 * budget**0.5  # the path that the fit must find


def _lowest(budget: float) -> float:
    return 3.0 * (budget / 4e15) ** -0.05


def _points(noise: float = 0.0, seed: int = 0):
    generator = np.random.default_rng(seed)
    return {
        budget: [
            (size, _lowest(budget) + 0.05 * (np.log(size) - np.log(_best(budget))) ** 2 + generator.normal(0, noise))
            for size in SIZES
        ]
        for budget in BUDGETS
    }


def test_a_parabola_finds_the_known_optimum():
    parabola = fit_parabola(_points()[4e15])
    np.testing.assert_allclose([parabola.size, parabola.loss, parabola.curvature], [_best(4e15), 3.0, 0.05], rtol=1e-6)
    np.testing.assert_allclose(parabola(np.array([parabola.size])), 3.0)


def test_the_path_is_found():
    fit = fit_isoflop(_points(noise=0.004), samples=50)
    assert fit.path is not None and abs(fit.path.exponent - 0.5) < 0.05
    assert 0.002 < fit.noise < 0.008
    assert all(band.low < fit.parabolas[budget].size < band.high for budget, band in fit.size_bands.items())
    assert fit.losses is not None and fit.loss_exponent_band is not None
    assert abs(fit.losses.exponent + 0.05) < 0.002
    assert fit.loss_exponent_band.low < fit.losses.exponent < fit.loss_exponent_band.high
    assert len(fit.loss_samples) == len(fit.samples)


def test_bands_of_90_percent_hold_the_truth_about_that_often():
    sizes, losses, exponents = [], [], []
    for seed in range(60):
        fit = fit_isoflop(_points(noise=0.004, seed=seed), samples=60, level=0.9, seed=seed)
        sizes += [band.low < _best(budget) < band.high for budget, band in fit.size_bands.items()]
        losses += [band.low < _lowest(budget) < band.high for budget, band in fit.loss_bands.items()]
        assert fit.exponent_band is not None
        exponents.append(fit.exponent_band.low < 0.5 < fit.exponent_band.high)
    assert 0.8 < np.mean(sizes) < 0.97
    assert 0.75 < np.mean(losses) < 0.99 and 0.75 < np.mean(exponents) < 0.99


def test_more_noise_widens_the_bands():
    narrow, wide = (fit_isoflop(_points(), noise=noise, samples=100).size_bands[4e15] for noise in (0.002, 0.02))
    assert np.log(wide.high / wide.low) > 5 * np.log(narrow.high / narrow.low)


def test_what_cannot_be_fitted_is_refused_by_name():
    with pytest.raises(UserError, match="3 different sizes, but there are 2"):
        fit_parabola([(1e6, 3.0), (2e6, 2.9), (2e6, 2.8)])
    with pytest.raises(UserError, match=r"budget 1e\+15: .*do not rise on both sides"):
        fit_isoflop({1e15: [(1e6, 2.0), (2e6, 3.0), (4e6, 2.0)]})
    with pytest.raises(UserError, match="give noise="):
        fit_isoflop({1e15: [(1e6, 3.0), (2e6, 2.0), (4e6, 3.0)]})
    with pytest.raises(UserError, match="two budgets"):
        fit_path({1e15: 1e6})


def test_the_figures_are_written_as_png_and_svg(tmp_path):
    points = _points(noise=0.004)
    fit, alone = (fit_isoflop(p, samples=20) for p in (points, {4e15: points[4e15]}))
    written = plot_isoflop(tmp_path / "isoflop", points, fit, "synthetic")
    written += plot_losses(tmp_path / "losses", {"several": fit, "one": alone})
    written += plot_frontiers(tmp_path / "frontiers", {"FLOPs": {"a": [(1.0, 3.0), (2.0, 2.5)], "b": [(1.0, 3.1)]}})
    written += plot_pareto(tmp_path / "pareto", {"FLOPs": [("a", 1.0, 3.0), ("b", 2.0, 2.5)]}, "loss")
    written += plot_depth_curves(tmp_path / "depth", {"a": [(1, 3.0), (2, 2.5)]}, "passes")
    assert [path.suffix for path in written] == [".png", ".svg"] * 5
    assert all(path.stat().st_size > 1000 for path in written)


def test_the_pareto_front_holds_what_nothing_beats():
    assert pareto_front([(3, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (4, 1.5)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]

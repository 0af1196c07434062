"""IsoFLOP analysis: a parabola per budget, the compute-optimal path through their minima, and bootstrap bands.

At one budget C the loss is fitted as a parabola in log N; its minimum gives the best size N*(C) and the best loss
L*(C). Over budgets log N* = log k + a log C, and L* is a power law of C as well. References: Hoffmann et al., Training
Compute-Optimal Large Language Models (2022), approach 2; Bae et al., Mixture-of-Recursions (2025), section 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mor_jax.errors import UserError, require

Points = Mapping[float, Sequence[tuple[float, float]]]
"""Per budget: (size, loss) of every run."""
_LEAST_POINTS = 3


@dataclass(frozen=True)
class Parabola:
    """loss = curvature * (log N - log optimum)^2 + loss at the optimum."""

    curvature: float
    log_size: float
    """log N*: where the parabola has its minimum."""
    loss: float
    """Loss at the minimum."""

    @property
    def size(self) -> float:
        """N*, the best size."""
        return float(np.exp(self.log_size))

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Predict the losses of sizes."""
        return self.curvature * (np.log(sizes) - self.log_size) ** 2 + self.loss


@dataclass(frozen=True)
class PowerLaw:
    """Best size, or loss there, = factor * C ** exponent."""

    exponent: float
    log_factor: float

    def __call__(self, budgets: np.ndarray) -> np.ndarray:
        """Predict the value at budgets."""
        return np.exp(self.log_factor + self.exponent * np.log(budgets))


@dataclass(frozen=True)
class Band:
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class IsoFlopFit:
    """Everything that an isoFLOP analysis says."""

    parabolas: dict[float, Parabola]
    """By budget."""
    path: PowerLaw | None
    """None for a single budget."""
    noise: float
    """Standard deviation of a loss that the bands assume."""
    size_bands: dict[float, Band]
    """Interval of N* by budget."""
    exponent_band: Band | None
    samples: tuple[PowerLaw, ...]
    """Paths of the bootstrap."""
    loss_bands: dict[float, Band]
    """Interval of L* by budget."""
    losses: PowerLaw | None
    """L* over budgets; None for a single one."""
    loss_exponent_band: Band | None
    loss_samples: tuple[PowerLaw, ...]
    """Those of the bootstrap, one for each of ``samples``."""


def fit_parabola(points: Sequence[tuple[float, float]]) -> Parabola:
    """Fit a parabola in log size by least squares.

    Args:
        points: (size, loss), at three different sizes or more.

    Raises:
        UserError: too few sizes, or a parabola that opens downwards: the sizes do not bracket the optimum.
    """
    sizes, losses = (np.array(values, float) for values in zip(*points, strict=True))
    different = len(set(sizes.tolist()))
    require(different >= _LEAST_POINTS, f"a parabola needs {_LEAST_POINTS} different sizes, but there are {different}")
    x = np.log(sizes)
    center = x.mean()  # keeps the normal equations well conditioned
    a, b, c = np.polyfit(x - center, losses, 2)
    require(a > 0, f"the losses of sizes {sorted(set(sizes.tolist()))} do not rise on both sides: no optimum")
    return Parabola(curvature=float(a), log_size=float(center - b / (2 * a)), loss=float(c - b**2 / (4 * a)))


def fit_path(optima: Mapping[float, float]) -> PowerLaw:
    """Fit log N* = log k + a log C by least squares.

    Args:
        optima: N*, or the loss there, by budget, for two budgets or more.
    """
    require(len(optima) >= 2, f"a path needs two budgets, but there are {len(optima)}")
    exponent, log_factor = np.polyfit(np.log(list(optima)), np.log(list(optima.values())), 1)
    return PowerLaw(exponent=float(exponent), log_factor=float(log_factor))


def fit_isoflop(
    points: Points, *, noise: float | None = None, samples: int = 500, level: float = 0.9, seed: int = 0
) -> IsoFlopFit:
    """Fit every budget and the path, with parametric bootstrap bands.

    Args:
        points: runs per budget.
        noise: standard deviation of a loss between seeds; None estimates it from the residuals of the parabolas, which
            needs more than three points at some budget.
        samples: refits with noise added to the fitted losses.
        level: of the confidence intervals.
        seed: of the noise.

    Raises:
        UserError: a budget without an optimum, or no way to estimate the noise.
    """
    require(0 < level < 1, f"level={level} is outside (0, 1)")
    parabolas = {budget: _named_fit(budget, runs) for budget, runs in sorted(points.items())}
    noise = _residual_noise(points, parabolas) if noise is None else noise
    generator = np.random.default_rng(seed)
    drawn = [found for _ in range(samples) if (found := _resample(points, parabolas, noise, generator)) is not None]
    several = len(parabolas) > 1
    paths = tuple(fit_path({b: p.size for b, p in found.items()}) for found in drawn if several)
    losses = tuple(fit_path({b: p.loss for b, p in found.items()}) for found in drawn if several)
    return IsoFlopFit(
        parabolas=parabolas,
        path=fit_path({b: p.size for b, p in parabolas.items()}) if several else None,
        noise=noise,
        size_bands={b: _band([found[b].size for found in drawn], level) for b in parabolas if drawn},
        exponent_band=_band([each.exponent for each in paths], level) if paths else None,
        samples=paths,
        loss_bands={b: _band([found[b].loss for found in drawn], level) for b in parabolas if drawn},
        losses=fit_path({b: p.loss for b, p in parabolas.items()}) if several else None,
        loss_exponent_band=_band([each.exponent for each in losses], level) if losses else None,
        loss_samples=losses,
    )


def _named_fit(budget: float, runs: Sequence[tuple[float, float]]) -> Parabola:
    try:
        return fit_parabola(runs)
    except UserError as error:
        raise UserError(f"budget {budget:g}: {error}") from error


def _residual_noise(points: Points, parabolas: Mapping[float, Parabola]) -> float:
    """Pool the residuals over budgets; three parameters of each parabola are spent."""
    squares, freedom = 0.0, 0
    for budget, runs in points.items():
        sizes, losses = (np.array(values) for values in zip(*runs, strict=True))
        squares += float(np.sum((parabolas[budget](sizes) - losses) ** 2))
        freedom += len(runs) - 3
    require(freedom > 0, "three points per budget fit a parabola exactly: give noise= (the spread between seeds)")
    return float(np.sqrt(squares / freedom))


def _resample(
    points: Points, parabolas: Mapping[float, Parabola], noise: float, generator: np.random.Generator
) -> dict[float, Parabola] | None:
    """Parabolas of one noisy copy of the fitted losses; None where some budget loses its optimum."""
    found = {}
    for budget, runs in points.items():
        sizes = np.array([size for size, _ in runs])
        losses = parabolas[budget](sizes) + generator.normal(0.0, noise, len(sizes))
        try:
            found[budget] = fit_parabola(list(zip(sizes, losses, strict=True)))
        except UserError:
            return None
    return found


def _band(values: Sequence[float], level: float) -> Band:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Band(float(low), float(high))

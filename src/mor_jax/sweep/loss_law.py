"""One law of loss for plain and recursive models: what is another pass over shared parameters worth?

L = E + A (N_once + r^phi N_shared)^-alpha + B D^-beta: N_once parameters are used once, N_shared r times (the mean
passes that are computed), D tokens are seen. phi = 0 says that further passes are worth nothing, phi = 1 that a pass is
worth as much as parameters of its own. References: Hoffmann et al., Training Compute-Optimal Large Language Models
(2022), approach 3; phi as in arXiv 2604.21106, which finds 0.46 for plain looping.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from mor_jax.errors import require
from mor_jax.sweep.fit import Band

_SCALE = 1e6
"""Parameters and tokens are counted in millions while fitting."""
_HUBER = 0.01
"""Nats beyond which a residual counts linearly: a run that went wrong does not bend the law."""
_STARTS = tuple((alpha, beta, phi) for alpha in (0.2, 0.4, 0.8) for beta in (0.2, 0.4, 0.8) for phi in (0.1, 0.6))
_LOW = (0.0, -10.0, 0.02, -10.0, 0.02, -1.0)
_HIGH = (10.0, 10.0, 2.0, 10.0, 2.0, 2.0)
"""Bounds of E, log A, alpha, log B, beta, phi."""


@dataclass(frozen=True)
class LawPoint:
    """A finished run, as the law sees it."""

    once: float
    """N_once."""
    shared: float
    """N_shared."""
    passes: float
    """r."""
    tokens: float
    """D."""
    loss: float
    """Nats per token."""
    family: str = ""
    """Bootstrap samples keep the number of runs of each."""


@dataclass(frozen=True)
class LossLaw:
    """Fitted constants; parameters and tokens in millions."""

    irreducible: float
    """E."""
    log_a: float
    alpha: float
    log_b: float
    beta: float
    phi: float
    """Value of a pass."""

    def __call__(self, points: Sequence[LawPoint]) -> np.ndarray:
        """Predict losses [points]."""
        return _predict(np.array(list(vars(self).values())), _columns(points))


@dataclass(frozen=True)
class LawFit:
    """The law, how well it fits, and what the data leave open."""

    law: LossLaw
    residual: float
    """Root of the mean squared residual, nats."""
    phi_band: Band
    """Bootstrap interval of phi."""
    samples: int
    """Bootstrap fits."""


def fit_loss_law(points: Sequence[LawPoint], *, samples: int = 200, level: float = 0.95, seed: int = 0) -> LawFit:
    """Fit the law by least squares (Huber), and phi's interval by resampling runs within families.

    Args:
        points: finished runs, some of which share parameters.
        samples: of the bootstrap.
        level: of the interval.
        seed: of the resampling.

    Raises:
        UserError: too few runs, or none that shares parameters or none that does not.
    """
    require(len(points) > len(_LOW), f"the law has {len(_LOW)} constants: {len(points)} runs do not determine them")
    passes = {point.passes for point in points if point.shared}
    require(len(passes) > 0, "no run shares parameters: nothing says what a pass is worth")
    require(any(not point.shared for point in points), "every run shares parameters: there is no plain model")
    best = min((_solve(points, _start(points, *start)) for start in _STARTS), key=lambda found: found.cost)
    generator = np.random.default_rng(seed)
    families = [[p for p in points if p.family == name] for name in dict.fromkeys(p.family for p in points)]
    phis = []
    for _ in range(samples):
        drawn = [own[i] for own in families for i in generator.integers(len(own), size=len(own))]
        phis.append(float(_solve(drawn, best.x).x[-1]))
    low, high = np.quantile(phis, [(1 - level) / 2, (1 + level) / 2])
    law = LossLaw(*map(float, best.x))
    residual = float(np.sqrt(np.mean((law(points) - [point.loss for point in points]) ** 2)))
    return LawFit(law, residual, Band(float(low), float(high)), samples)


def _start(points: Sequence[LawPoint], alpha: float, beta: float, phi: float) -> np.ndarray:
    """Constants that share the reducible loss between size and tokens at the middle run."""
    columns = _columns(points)
    lowest = float(columns[-1].min())
    size, tokens = (float(np.median(values)) for values in (columns[0] + columns[1], columns[3]))
    half = np.log(lowest / 4)
    return np.array([lowest / 2, half + alpha * np.log(size), alpha, half + beta * np.log(tokens), beta, phi])


def _solve(points: Sequence[LawPoint], start: np.ndarray):
    columns = _columns(points)
    return least_squares(
        lambda x: _predict(x, columns) - columns[-1],
        np.clip(start, np.array(_LOW) + 1e-6, np.array(_HIGH) - 1e-6),
        bounds=(_LOW, _HIGH),
        loss="huber",
        f_scale=_HUBER,
        x_scale=(1.0, 1.0, 0.1, 1.0, 0.1, 0.1),
        max_nfev=400,
    )


def _columns(points: Sequence[LawPoint]) -> tuple[np.ndarray, ...]:
    """N_once, N_shared (millions), r, D (millions), loss."""
    once, shared, passes, tokens, loss = np.array([(p.once, p.shared, p.passes, p.tokens, p.loss) for p in points]).T
    return once / _SCALE, shared / _SCALE, passes, tokens / _SCALE, loss


def _predict(x: np.ndarray, columns: tuple[np.ndarray, ...]) -> np.ndarray:
    irreducible, log_a, alpha, log_b, beta, phi = x
    once, shared, passes, tokens, _ = columns
    size = once + passes**phi * shared
    return irreducible + np.exp(log_a) * size**-alpha + np.exp(log_b) * tokens**-beta

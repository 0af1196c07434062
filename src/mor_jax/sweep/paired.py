"""Differences between two groups of runs that share their seeds, with Student's t-interval.

Runs of one seed see the same batches and start from the same key, so the difference is taken seed by seed.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of one group's loss less the other's."""

    mean: float
    half_width: float | None
    """Of the 95% t-interval; None for a single seed, which has none."""
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says which of the two is better; a single seed does not."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        """The mean and its interval, as in a table."""
        if self.half_width is None:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.mean - self.half_width:+.4f}, {self.mean + self.half_width:+.4f}]"


def paired_difference(
    ours: Mapping[int, float], base: Mapping[int, float], level: float = 0.95
) -> PairedDifference | None:
    """Compare two groups over the seeds that both have.

    Args:
        ours: loss by seed.
        base: loss by seed of what it is compared with.
        level: of the interval.

    Returns:
        The difference ours - base; None without a common seed.
    """
    values = [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]
    if not values:
        return None
    if len(values) == 1:
        return PairedDifference(values[0], None, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    factor = float(student_t.ppf((1 + level) / 2, len(values) - 1))
    return PairedDifference(statistics.fmean(values), factor * error, len(values))

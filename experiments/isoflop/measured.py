"""What the comparison's results say, as numbers: families at their best, isoFLOP fits, the law of loss, frontiers.

What was chosen, was chosen on `choose`; every figure here is of `report`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ablation import loss_on
from comparison import Comparison
from families import FAMILIES, Name
from scipy.stats import t as student_t

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.model.flops import block_parameters
from mor_jax.sweep.fit import Band, IsoFlopFit, fit_isoflop
from mor_jax.sweep.loss_law import LawFit, LawPoint, fit_loss_law
from mor_jax.sweep.paired import PairedDifference
from mor_jax.sweep.runs import SweepRun

Result = Mapping[str, Any]
COSTS = {
    "training FLOPs": "train_flops",
    "parameters": "parameters",
    "serving FLOPs per token": "serving_flops_per_token",
    "KV bytes per token": "kv_bytes_per_token",
}
"""What a model costs, and where a result has it."""


@dataclass(frozen=True)
class Measured:
    """The comparison with its finished runs."""

    comparison: Comparison
    results: Mapping[str, Result]
    """By name, whatever their state."""

    def done(self, runs: Sequence[SweepRun]) -> list[Result]:
        """Return the results of runs that are finished and measured on `report`."""
        found = (self.results.get(run.name) for run in runs)
        return [result for result in found if result is not None and loss_on(result, "report") is not None]

    def all_done(self) -> list[Result]:
        """Return every finished result."""
        return [result for result in self.results.values() if loss_on(result, "report") is not None]

    def at_best(self, family: Name) -> list[Result]:
        """Return the seeds of a family's best size at the largest budget."""
        return self.done(self.comparison.at_best(self.results, family, range(6)))

    @property
    def noise(self) -> float | None:
        """Standard deviation of a loss between seeds, pooled over groups; None while there are no two seeds."""
        squares = freedom = 0.0
        for losses in self._by_group():
            squares += sum((loss - statistics.fmean(losses)) ** 2 for loss in losses)
            freedom += len(losses) - 1
        return math.sqrt(squares / freedom) if freedom else None

    def _by_group(self) -> Iterator[list[float]]:
        groups: dict[str, list[float]] = {}
        for result in self.all_done():
            groups.setdefault(result["group"], []).append(reported(result))
        return iter(groups.values())

    def points(self, family: Name, budget: int) -> list[tuple[float, float]]:
        """Return (parameters without embedding, loss of seed 0) of a family's sizes at a budget."""
        found = self.done(self.comparison.sizes(self.results, family, budget))
        return [(result["non_embedding"], reported(result)) for result in found]

    def isoflop(self, family: Name) -> tuple[IsoFlopFit | None, dict[float, str]]:
        """Return the fit of a family over the budgets that have an optimum inside, and why the others have none."""
        kept: dict[float, list[tuple[float, float]]] = {}
        refused: dict[float, str] = {}
        for index, budget in enumerate(self.comparison.budgets):
            points = self.points(family, index)
            sizes = [size for size, _ in points]
            try:
                size = fit_isoflop({budget: points}, noise=0.0, samples=0).parabolas[budget].size if points else 0.0
                inside = bool(sizes) and min(sizes) < size < max(sizes)
                why = "not run" if not points else f"the parabola's minimum, {size:.3g} parameters, lies outside"
            except UserError as error:
                inside, why = False, str(error).split(": ", 1)[-1]
            if inside:
                kept[budget] = points
            else:
                refused[budget] = why
        if not kept:
            return None, refused
        if self.noise is None and all(len(points) == 3 for points in kept.values()):
            return fit_isoflop(kept, noise=0.0, samples=0), refused  # nothing says how far seeds spread: no bands
        return fit_isoflop(kept, noise=self.noise), refused

    def fits(self) -> dict[Name, IsoFlopFit]:
        """Return the isoFLOP fits that there are."""
        return {family: fit for family in FAMILIES if (fit := self.isoflop(family)[0]) is not None}

    def law(self, samples: int = 200) -> LawFit | str:
        """Return the law of loss over the runs of all families' sizes, or why it cannot be fitted."""
        runs = {
            run.name: run
            for family in FAMILIES
            for budget in range(len(self.comparison.budgets))
            for run in self.comparison.sizes(self.results, family, budget)
        }
        finished = self.done(list(runs.values()))
        if len({_budget(result) for result in finished}) < 2:
            return "runs at one budget do not tell what size brings from what text brings"
        points = [law_point(result) for result in finished]
        try:
            return fit_loss_law(points, samples=samples)
        except UserError as error:
            return str(error)

    def frontiers(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Return (cost, loss) by kind of cost and family, of every run at a budget that all families have runs at."""
        at = {family: {_budget(r) for r in self.all_done() if family_of(r) == family} for family in FAMILIES}
        shared = set.intersection(*at.values())
        runs = [result for result in self.all_done() if _budget(result) in shared]
        return {
            label: {
                family: [(_cost(r, key), reported(r)) for r in runs if family_of(r) == family]
                for family in FAMILIES
                if shared
            }
            for label, key in COSTS.items()
        }

    def flops_for_the_loss(self, family: Name) -> tuple[float, Band] | None:
        """Return the FLOPs that vanilla needs for a family's best loss at the largest budget, over that budget.

        With its 90% bootstrap interval; None unless both families have an L*(C) over two budgets.
        """
        fits, budget = self.fits(), np.array([self.comparison.budgets[-1]])
        if family not in fits or "vanilla" not in fits:
            return None
        ours, base = fits[family], fits["vanilla"]
        if ours.losses is None or base.losses is None or not ours.loss_samples or not base.loss_samples:
            return None

        def ratio(ours: Any, base: Any) -> float:
            needed = (np.log(ours(budget)[0]) - base.log_factor) / base.exponent
            return float(np.exp(needed) / budget[0])

        drawn = [ratio(one, other) for one, other in zip(ours.loss_samples, base.loss_samples, strict=False)]
        low, high = np.quantile(drawn, [0.05, 0.95])
        return ratio(ours.losses, base.losses), Band(float(low), float(high))

    def against_no_costlier(self, label: str) -> tuple[Result, PairedDifference | None] | None:
        """Return the best vanilla model that costs no more than the better MoR at its best, and MoR's loss less its.

        Their seeds are not the same, so the interval is that of two means whose seeds spread by ``noise``.

        Args:
            label: of COSTS.
        """
        leader = self.comparison.leader(self.results)
        ours = self.at_best(leader) if leader else []
        if not ours:
            return None
        most = statistics.fmean(result[COSTS[label]] for result in ours)
        base = [r for r in self.all_done() if family_of(r) == "vanilla" and r[COSTS[label]] <= 1.001 * most]
        if not base:
            return None
        best = min(base, key=lambda result: result["nll"])  # chosen on `choose`
        same = [reported(result) for result in base if result["group"] == best["group"]]
        mean = statistics.fmean(map(reported, ours)) - statistics.fmean(same)
        if self.noise is None:
            return best, PairedDifference(mean, None, 1)
        freedom = sum(len(losses) - 1 for losses in self._by_group())
        error = self.noise * math.sqrt(1 / len(ours) + 1 / len(same))
        return best, PairedDifference(mean, float(student_t.ppf(0.975, freedom)) * error, min(len(ours), len(same)))


def reported(result: Result) -> float:
    """Return the causal loss on `report`."""
    loss = loss_on(result, "report")
    assert loss is not None
    return loss


def _budget(result: Result) -> float:
    return float(f"{result['train_flops']:.1e}")


def _cost(result: Result, key: str) -> float:
    return _budget(result) if key == "train_flops" else result[key]  # steps are whole: a budget is met within 0.1%


def family_of(result: Result) -> str:
    """Return the family that a run's name begins with."""
    return result["name"].split("-")[0]


def mean_passes(result: Result) -> float:
    """Return the passes that a token takes in the trained model, on average."""
    recursions = result["config"]["model"]["recursion"]["num_recursions"]
    shares = result.get("tokens_per_depth")
    return float(recursions) if shares is None else sum(depth * share for depth, share in enumerate(shares))


def law_point(result: Result) -> LawPoint:
    """Return a finished run as the law of loss sees it."""
    model = config_io.from_dict(Config, result["config"]).model
    shared = 0 if model.recursion.sharing == "none" else block_parameters(model)
    once, passes = result["non_embedding"] - shared, mean_passes(result)
    return LawPoint(once, shared, passes, result["tokens"], reported(result), family_of(result))

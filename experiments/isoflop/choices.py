"""What the comparison's results have decided so far: rates, variants, best sizes, the better MoR; and its runs.

All choices are made on the held-out half `choose`. Methods that say None, or give no runs, do not know it yet.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ablation import loss_on
from families import BUDGETS, Name, Try, Variant, configured, tries_of, variants_of

from mor_jax.sweep.paired import PairedDifference, paired_difference
from mor_jax.sweep.recipes import seeded
from mor_jax.sweep.runs import SweepRun

Result = Mapping[str, Any]
Results = Mapping[str, Result]
TRANSFER = -1 / 8
"""A peak rate is that of another budget times (budget / other budget) to this power, at every size: the exponent of
DeepSeek LLM (2024), section 3.1."""
FIRST_RATE = {"full": 8e-3, "debug": 4e-3}
"""Peak rate that is tried first, by scale: at 4e15 FLOPs the ablation found 4e-3 best of 1e-3, 2e-3 and 4e-3."""
CHECKED: tuple[Name, ...] = ("vanilla", "mor")
_MOST_RATES = 6
MIDDLE, INNER, _ALL = 2, (2, 1, 3), (0, 1, 2, 3, 4)
SEEDS, FEWER_SEEDS = tuple(range(6)), tuple(range(3))


@dataclass(frozen=True)
class Choices:
    """The runs at one scale on one corpus; methods that say None do not know it yet."""

    scale: str = "full"
    corpus: str = "data/isoflop"
    _made: dict[tuple[Any, ...], SweepRun] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of the isoFLOP runs, ascending."""
        return BUDGETS[self.scale]

    def run(
        self, variant: Variant, width: int, budget: float, rate: float, seed: int = 0, what: Try | None = None
    ) -> SweepRun:
        """Return one run; its name says all that it depends on."""
        key = (variant.name, width, budget, rate, seed, what and what.name)
        if key not in self._made:
            changes = {"optimizer.learning_rate": rate, **(what.changes if what else {})}
            config = configured(self.scale, variant, width, budget, changes, self.corpus)
            name = f"{variant.name}-d{width}-{short(budget)}-lr{rate:g}" + (f"-{what.name}" if what else "")
            (self._made[key],) = seeded(name, config, (seed,))
        return self._made[key]

    def some_sizes(self, results: Results, variant: Variant, budget: int, which: Sequence[int]) -> list[SweepRun]:
        """Return some sizes of a variant at its family's rate; none while that is unknown."""
        rate = self.rate(results, variant.family, budget)
        if rate is None:
            return []
        widths = variant.widths(self.scale)[budget]
        return [self.run(variant, widths[index], self.budgets[budget], rate) for index in which]

    def sizes(self, results: Results, family: Name, budget: int, which: Sequence[int] = _ALL) -> list[SweepRun]:
        """Return a family's sizes at a budget; none while its variant or its rate is unknown."""
        variant = self.variant(results, family)
        return [] if variant is None else self.some_sizes(results, variant, budget, which)

    def all_sizes(self, results: Results, budget: int, families: Sequence[Name]) -> Iterator[SweepRun]:
        for which in (1, 3, 0, 4):
            for family in families:
                yield from self.sizes(results, family, budget, (which,))

    def around_best(self, results: Results, family: Name, budget: int) -> list[SweepRun]:
        """Return the inner sizes, and the outer one beside the best of them if that is at their edge."""
        which = list(INNER)
        losses = {
            index: _loss(results, run) for index in which for run in self.sizes(results, family, budget, (index,))
        }
        best = _best(losses)
        if best is not None and best != MIDDLE:
            which.append(0 if best == 1 else _ALL[-1])
        return self.sizes(results, family, budget, which)

    def at_best(self, results: Results, family: Name, seeds: Sequence[int] = (0,), budget: int = 2) -> list[SweepRun]:
        """Return a family's best size at a budget with some seeds; none while it is unknown."""
        around = self.around_best(results, family, budget)
        best = _best({run.config.model.d_model: _loss(results, run) for run in around})
        variant, rate = self.variant(results, family), self.rate(results, family, budget)
        if best is None or variant is None or rate is None:
            return []
        return [self.run(variant, best, self.budgets[budget], rate, seed) for seed in seeds]

    def swept(self, results: Results, family: Name) -> tuple[list[SweepRun], float | None]:
        """Return the runs of a family's rates at the smallest budget, and the best rate."""
        variant = variants_of(family)[0]
        first, width = FIRST_RATE[self.scale], variant.widths(self.scale)[0][MIDDLE]
        rates = [first, 2 * first, first / 2]
        while True:
            runs = {rate: self.run(variant, width, self.budgets[0], rate) for rate in rates}
            best = _best({rate: _loss(results, run) for rate, run in runs.items()})
            if best is None or min(rates) < best < max(rates) or len(rates) == _MOST_RATES:
                return list(runs.values()), best
            rates.append(2 * best if best == max(rates) else best / 2)

    def tried(self, results: Results, family: Name) -> tuple[Variant, ...]:
        """Return the variants of a family; those of grown models wait for MoR's."""
        mor = self.variant(results, "mor") if family == "grown" else None
        return () if family == "grown" and mor is None else variants_of(family, mor)

    def variant(self, results: Results, family: Name) -> Variant | None:
        """Return the variant whose best of three sizes at the smallest budget is the best."""
        losses: dict[str, float | None] = {}
        tried = {variant.name: variant for variant in self.tried(results, family)}
        for name, variant in tried.items():
            sizes = [_loss(results, run) for run in self.some_sizes(results, variant, 0, INNER)]
            known = [loss for loss in sizes if loss is not None]
            losses[name] = min(known) if known and len(known) == len(sizes) else None
        best = _best(losses)
        return None if best is None else tried[best]

    def checked(self, results: Results, family: Name) -> tuple[list[SweepRun], float | None]:
        """Return the runs that check the transferred rate at the middle budget, and the best rate of them.

        Vanilla and MoR are checked; the other families take the factor that MoR's check finds.
        """
        variant, rate = self.variant(results, family), self.swept(results, family)[1]
        if variant is None or rate is None:
            return [], None
        rate, budget = transferred(rate, *self.budgets[:2]), self.budgets[1]
        if family not in CHECKED:
            of_mor, best = self.checked(results, "mor")
            return [], None if best is None else rate * best / of_mor[0].config.optimizer.learning_rate
        width = variant.widths(self.scale)[1][MIDDLE]
        runs = {factor * rate: self.run(variant, width, budget, factor * rate) for factor in (1.0, 2.0, 0.5)}
        return list(runs.values()), _best({each: _loss(results, run) for each, run in runs.items()})

    def rate(self, results: Results, family: Name, budget: int) -> float | None:
        """Return a family's peak rate at a budget: swept, checked, transferred."""
        if budget == 0:
            return self.swept(results, family)[1]
        rate = self.checked(results, family)[1]
        return rate if budget == 1 or rate is None else transferred(rate, *self.budgets[1:])

    def leader(self, results: Results) -> Name | None:
        """Return the better of MoR and grown MoR at the middle budget."""
        losses: dict[Name, float | None] = {}
        for family in ("mor", "grown"):
            best = self.at_best(results, family, budget=1)
            losses[family] = _loss(results, best[0]) if best else None
        return _best(losses)

    def leaders(self, results: Results) -> tuple[Name, ...]:
        """Return vanilla and the better MoR; nothing while that is unknown."""
        leader = self.leader(results)
        return () if leader is None else ("vanilla", leader)

    def lead(self, results: Results, half: str = "choose") -> PairedDifference | None:
        """Return the better MoR's causal loss less vanilla's, each at its best size at the largest budget."""
        leader = self.leader(results)
        return None if leader is None else self.difference(results, leader, "vanilla", half)

    def mor_wins(self, results: Results) -> bool:
        """Whether the better MoR is ahead of vanilla, and the interval says so."""
        lead = self.lead(results)
        return lead is not None and lead.mean < 0 and lead.excludes_zero

    def difference(self, results: Results, family: Name, base: Name, half: str) -> PairedDifference | None:
        """Return the difference of two families at the largest budget, each at its best size, over paired seeds."""
        ours, theirs = (self.at_best(results, each, SEEDS) for each in (family, base))
        return paired(results, ours, theirs, half)

    def tries(self, results: Results, family: Name) -> dict[str, SweepRun]:
        """Return the changes of a family's best at the middle budget, by name; the first is no change."""
        variant, base = self.variant(results, family), self.at_best(results, family, budget=1)
        if variant is None or not base:
            return {}
        config = base[0].config
        width, rate = config.model.d_model, config.optimizer.learning_rate
        tried = tries_of(variant, width)
        return {"": base[0]} | {t.name: self.run(variant, width, self.budgets[1], rate, 0, t) for t in tried}

    def best_try(self, results: Results, family: Name) -> tuple[Try | None, list[SweepRun]]:
        """Return the change that helps most, if one does, and its seeds at the family's best size, largest budget."""
        best = _best({name: _loss(results, run) for name, run in self.tries(results, family).items()})
        variant, runs = self.variant(results, family), self.at_best(results, family, FEWER_SEEDS)
        if not best or variant is None or not runs:
            return None, []
        config = runs[0].config
        width, rate = config.model.d_model, config.optimizer.learning_rate
        what = next(t for t in tries_of(variant, width) if t.name == best)
        return what, [self.run(variant, width, self.budgets[2], rate, seed, what) for seed in FEWER_SEEDS]


def transferred(rate: float, budget: float, other: float) -> float:
    """Return the rate at another budget, to three digits."""
    return float(f"{rate * (other / budget) ** TRANSFER:.3g}")


def paired(results: Results, ours: Sequence[SweepRun], base: Sequence[SweepRun], half: str) -> PairedDifference | None:
    """Return the paired difference of runs' losses on a half."""
    found, other = (
        {run.config.train.seed: x for run in runs if (x := loss_on(results.get(run.name), half)) is not None}
        for runs in (ours, base)
    )
    return paired_difference(found, other)


def in_turn(groups: Sequence[Sequence[SweepRun]]) -> Iterator[SweepRun]:
    """Yield the first of each group, then the second of each, and so on."""
    for index in range(max(map(len, groups), default=0)):
        yield from (group[index] for group in groups if index < len(group))


def finished(results: Results) -> dict[str, Result]:
    """Return the results of runs that ended, by themselves or by diverging."""
    return {name: result for name, result in results.items() if result["state"] in ("done", "diverged")}


def _loss(results: Results, run: SweepRun) -> float | None:
    """Causal loss on `choose`: None before the run is finished, infinite if it diverged."""
    result = results.get(run.name)
    if result is None or result["state"] not in ("done", "diverged"):
        return None
    loss = loss_on(result)
    return math.inf if loss is None else loss


def _best(losses: Mapping[Any, float | None]) -> Any:
    """Key of the lowest loss; None while any is unknown."""
    known = {key: loss for key, loss in losses.items() if loss is not None}
    return min(known, key=lambda key: known[key]) if known and len(known) == len(losses) else None


def short(budget: float) -> str:
    """Return a budget as names have it."""
    return f"{budget:g}".replace("+", "")

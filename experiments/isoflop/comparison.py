"""Each family at its own best size: the runs in stages, most telling first, decided by the results as they come.

1. rates: at the smallest budget every family's peak rate, by factors of two until the best one is not at an edge;
2. variants: three sizes of every variant (depth of vanilla, N_r of MoR, share of growth); the best one goes on;
3. sizes, smallest budget: the other two sizes;
4. middle budget: the transferred rate, half and twice at the middle size, then sizes around the best of them;
5. largest budget, vanilla and the better MoR: sizes around the best; 6. their seeds, six each;
7. largest budget, the others: sizes around the best, three seeds;
8. tries: where MoR does not beat vanilla, four changes of each at the middle budget, the best of them at the largest;
9. confirmation: five models of one width at the paper's tokens for each parameter, three seeds;
10. the sizes that are left: the outer ones at the middle and the largest budget.

Rates are transferred by ``TRANSFER``. All choices are made on the held-out half `choose` (`nll` of a result). What
cannot be decided yet gives no runs: the plan unfolds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from choices import FEWER_SEEDS, INNER, SEEDS, Choices, Results, finished, in_turn, transferred
from families import CONFIRMATION, CONFIRMED, FAMILIES, Name

from mor_jax.sweep.runs import SweepRun

TRIES, CONFIRMING = "tries", "confirmation"
STAGES = (
    "rates",
    "variants",
    "sizes, smallest budget",
    "rate check, sizes, middle budget",
    "largest budget, vanilla and MoR",
    "seeds of vanilla and MoR",
    "largest budget, the others",
    TRIES,
    CONFIRMING,
    "sizes that are left",
)


@dataclass(frozen=True)
class Comparison(Choices):
    """The runs at one scale on one corpus, stage by stage."""

    def plan(self, results: Results) -> list[SweepRun]:
        """Return the runs that are decided on, those of the first stages first."""
        known: dict[str, SweepRun] = {}
        for runs in self.stages(results).values():
            for run in runs:
                known.setdefault(run.name, run)
        return list(known.values())

    def stages(self, results: Results) -> dict[str, list[SweepRun]]:
        """Return the runs of every stage of STAGES, each once, as far as they are decided on."""
        parts = (
            self._rates,
            self._variants,
            self._smallest,
            self._middle,
            self._leaders,
            self._leaders_seeds,
            self._others,
            self._tries,
            self._confirmation,
            self._left,
        )
        named = ({run.name: run for run in part(results)} for part in parts)
        return {stage: list(runs.values()) for stage, runs in zip(STAGES, named, strict=True)}

    def _rates(self, results: Results) -> Iterator[SweepRun]:
        yield from in_turn([self.swept(results, family)[0] for family in FAMILIES])

    def _variants(self, results: Results) -> Iterator[SweepRun]:
        for which in INNER:
            for family in FAMILIES:
                for variant in self.tried(results, family):
                    yield from self.some_sizes(results, variant, 0, (which,))

    def _smallest(self, results: Results) -> Iterator[SweepRun]:
        yield from self.all_sizes(results, 0, FAMILIES)

    def _middle(self, results: Results) -> Iterator[SweepRun]:
        yield from in_turn([self.checked(results, family)[0] for family in FAMILIES])
        for family in FAMILIES:
            yield from self.around_best(results, family, 1)

    def _leaders(self, results: Results) -> Iterator[SweepRun]:
        yield from in_turn([self.around_best(results, family, 2) for family in self.leaders(results)])

    def _leaders_seeds(self, results: Results) -> Iterator[SweepRun]:
        yield from in_turn([self.at_best(results, family, SEEDS) for family in self.leaders(results)])

    def _others(self, results: Results) -> Iterator[SweepRun]:
        leader = self.leader(results)
        others: list[Name] = [family for family in FAMILIES if leader and family not in ("vanilla", leader)]
        yield from in_turn([self.around_best(results, family, 2) for family in others])
        yield from in_turn([self.at_best(results, family, FEWER_SEEDS) for family in others])

    def _seeds_ended(self, results: Results) -> bool:
        seeds = [run for family in self.leaders(results) for run in self.at_best(results, family, SEEDS)]
        return len(seeds) == 2 * len(SEEDS) and all(run.name in finished(results) for run in seeds)

    def _tries(self, results: Results) -> Iterator[SweepRun]:
        leaders = self.leaders(results)
        if not self._seeds_ended(results) or self.mor_wins(results):
            return
        yield from in_turn([list(self.tries(results, family).values()) for family in leaders])
        yield from in_turn([self.best_try(results, family)[1] for family in leaders])

    def _confirmation(self, results: Results) -> Iterator[SweepRun]:
        if not self._seeds_ended(results):  # who waits for a choice would begin these and slow those that decide it
            return
        width, budget = CONFIRMATION[self.scale]
        for seed in FEWER_SEEDS:
            for variant in CONFIRMED:
                rate = self.rate(results, variant.family, 1)
                if rate is not None:
                    yield self.run(variant, width, budget, transferred(rate, self.budgets[1], budget), seed)

    def _left(self, results: Results) -> Iterator[SweepRun]:
        if self.leader(results) is not None:
            for budget in (1, 2):
                yield from self.all_sizes(results, budget, FAMILIES)

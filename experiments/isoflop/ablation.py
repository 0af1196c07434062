"""Which modern parts pay? The runs in stages, each chosen by the results before it, the most telling first.

1. sizes: three widths of each family, and at the middle one half and twice the learning rate, for Muon and for
   AdamW;
2. screen: every part with seed 0, at its family's best width and rate, and the base with seeds 0, 1, 2;
3. confirm: seeds 1 and 2 of the parts that seed 0 does not speak against, first those that gain enough with it;
4. repeat: three fresh seeds of the modern parts that would be kept, and of their base; then the rest of 3.

After the first stage a run starts as soon as what decides on it is known. All choices are made on the held-out half
`choose`, which the runs validate on (`nll`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from models import FAMILIES, Family, configured, scale_of

from mor_jax.sweep.paired import PairedDifference, paired_difference
from mor_jax.sweep.recipes import seeded
from mor_jax.sweep.runs import SweepRun

Result = Mapping[str, Any]
_K = TypeVar("_K")
FIRST, FRESH = (0, 1, 2), (3, 4, 5)
LEAST_GAIN = 0.01
"""Nats per token by which a part must be better to be kept."""
_DROPPED_ABOVE = 0.0
"""Effect of seed 0 above which a part gets no more seeds: seeds of the base spread by 0.003 to 0.004, and 0.01 is
wanted."""


@dataclass(frozen=True)
class Part:
    """One change of the base, or of what the base has."""

    name: str
    says: str
    changes: Mapping[str, Any]
    families: tuple[Family, ...] = FAMILIES
    replaces: bool = False
    """The base has what is tested, and these changes take it away."""
    stays: bool = False
    """In the code whatever comes out (optimisers, growth, gates): three seeds, no fresh ones."""


PARTS = (
    Part("adamw", "Muon instead of AdamW", {"optimizer.kind": "adamw"}, replaces=True, stays=True),
    Part(
        "growth-0.5",
        "growth: one pass for half of the steps, then routed",
        {"train.growth": [{"share": 0.5, "num_recursions": 1}]},
        ("mor",),
        stays=True,
    ),
    Part("qk-norm", "QK-norm", {"model.parts.qk_norm": True}),
    Part("value-residual", "value residual", {"model.parts.value_residual": True}),
    Part("low-capacity", "capacities 1, 0.5, 0.25", {"model.routing.capacities": [1.0, 0.5, 0.25]}, ("mor",)),
    Part("softcap", "logit soft-cap at 30", {"model.parts.logit_softcap": 30.0}),
    Part(
        "paper-gate",
        "the plain gate, alpha 2, instead of the paper's",
        {"model.routing.residual": "paper", "model.routing.alpha": 0.1},
        ("mor",),
        replaces=True,
        stays=True,
    ),
    Part(
        "growth-0.7",
        "growth: one pass for 0.7 of the steps, then routed",
        {"train.growth": [{"share": 0.7, "num_recursions": 1}]},
        ("mor",),
        stays=True,
    ),
    Part("no-aux-loss", "no auxiliary loss", {"model.routing.sampling": "none"}, ("mor",)),
    Part("unshared-norms", "norms of its own for every pass", {"model.recursion.share_norms": False}, ("mor",)),
    Part("lora-8", "LoRA of rank 8 for every pass", {"model.recursion.relaxation.lora_rank": 8}, ("mor",)),
    Part("lower-capacity", "capacities 1, 0.25, 0.125", {"model.routing.capacities": [1.0, 0.25, 0.125]}, ("mor",)),
    Part("residual-learned", "residual scale learned per pass", {"model.parts.residual_scale": "learned"}, ("mor",)),
    Part("encoding", "recursion encoding", {"model.recursion.relaxation.encoding": True}, ("mor",)),
)
"""In the order in which they are run."""
BASE = Part("base", "the base", {})
_BY_NAME = {part.name: part for part in (BASE, *PARTS)}


@dataclass(frozen=True)
class Ablation:
    """The runs at one scale on one corpus."""

    scale: str = "full"
    corpus: str = "data/isoflop"
    parts: tuple[Part, ...] = field(default=PARTS)
    _made: dict[tuple[Any, ...], SweepRun] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Runs by what they depend on: choices ask for the same ones hundreds of times."""

    def stages(self) -> tuple[Any, ...]:
        """Return what gives the runs of each stage, from the results before it."""
        return (self.sizes, self.decided)

    def decided(self, results: Mapping[str, Result]) -> list[SweepRun]:
        """Return the runs that the results so far ask for, once width and rate are known, the most telling first."""
        first = self.confirm(results, LEAST_GAIN)
        return [*self.screen(results), *first, *self.repeat(results), *self.confirm(results)]

    def sizes(self, results: Mapping[str, Result]) -> list[SweepRun]:
        """Return every width at the first rate, then the other rates of Muon and AdamW at the middle width."""
        scale = scale_of(self.scale)
        adamw = _BY_NAME["adamw"]
        tried = [(BASE, which, 1.0) for which in (1, 0, 2)]
        rates = ((BASE, 2.0), (adamw, 1.0), (BASE, 0.5), (adamw, 2.0), (adamw, 0.5))
        tried += [(part, 1, factor) for part, factor in rates]
        return [
            self.run(family, part, 0, scale.widths[family][which], factor * scale.rate)
            for part, which, factor in tried
            for family in FAMILIES
        ]

    def screen(self, results: Mapping[str, Result]) -> list[SweepRun]:
        """Return seed 0 of every part, and the base's first seeds."""
        runs = [self.at_best(results, family, BASE, seed) for seed in FIRST for family in FAMILIES]
        return runs + [self.at_best(results, family, part, 0) for part, family in self.tested()]

    def confirm(self, results: Mapping[str, Result], least_gain: float = -_DROPPED_ABOVE) -> list[SweepRun]:
        """Return the other first seeds of the parts that gain this much with seed 0, the largest gain first."""
        still_in: list[tuple[float, str, Family]] = []
        for part, family in self.tested():
            effect = self.effect(results, part, family, (0,))
            if effect and effect.mean <= -least_gain:
                still_in.append((effect.mean, part.name, family))
        return [
            self.at_best(results, family, _BY_NAME[name], seed)
            for _, name, family in sorted(still_in)
            for seed in FIRST[1:]
        ]

    def repeat(self, results: Mapping[str, Result]) -> list[SweepRun]:
        """Return fresh seeds of the modern parts that the first ones keep, and of their base."""
        kept = [
            (part, family)
            for part, family in self.tested()
            if not part.stays and pays(self.effect(results, part, family, FIRST))
        ]
        bases = [(BASE, family) for family in FAMILIES if any(family == of for _, of in kept)]
        return [self.at_best(results, family, part, seed) for part, family in bases + kept for seed in FRESH]

    def tested(self) -> Iterator[tuple[Part, Family]]:
        """Yield every part with every family that it is tested in."""
        return ((part, family) for part in self.parts for family in part.families)

    def run(self, family: Family, part: Part, seed: int, width: int, rate: float) -> SweepRun:
        """Return one run; its name says all that it depends on."""
        key = (family, part.name, seed, width, rate)
        if key not in self._made:
            changes = {**part.changes, "optimizer.learning_rate": rate}
            config = configured(self.scale, family, width, changes, self.corpus)
            (self._made[key],) = seeded(f"{family}-d{width}-lr{rate:g}-{part.name}", config, (seed,))
        return self._made[key]

    def at_best(self, results: Mapping[str, Result], family: Family, part: Part, seed: int) -> SweepRun:
        """Return a run at its family's best width and at the best rate of its optimiser, as far as they are known."""
        scale = scale_of(self.scale)
        middle = scale.widths[family][1]
        optimizer = part if part.name == "adamw" else BASE
        widths = {width: self.run(family, BASE, 0, width, scale.rate) for width in scale.widths[family]}
        rates = {
            factor * scale.rate: self.run(family, optimizer, 0, middle, factor * scale.rate)
            for factor in (1.0, 0.5, 2.0)
        }
        return self.run(family, part, seed, _best(results, widths, middle), _best(results, rates, scale.rate))

    def effect(
        self, results: Mapping[str, Result], part: Part, family: Family, seeds: tuple[int, ...], half: str = "choose"
    ) -> PairedDifference | None:
        """Return what a part changes in the causal loss, seed by seed; None if it was not run with any of them."""
        of_part, of_base = (
            {
                seed: loss
                for seed in seeds
                if (loss := loss_on(results.get(self.at_best(results, family, which, seed).name), half)) is not None
            }
            for which in (part, BASE)
        )
        return paired_difference(of_base, of_part) if part.replaces else paired_difference(of_part, of_base)


def _best(results: Mapping[str, Result], runs: Mapping[_K, SweepRun], default: _K) -> _K:
    """The key whose run has the lowest loss; the default where none is finished."""
    losses = {key: loss for key, run in runs.items() if (loss := loss_on(results.get(run.name))) is not None}
    return min(losses, key=lambda key: losses[key]) if losses else default


def loss_on(result: Result | None, half: str = "choose") -> float | None:
    """Return the causal loss on a held-out half; None if it was not measured."""
    if result is None or result["state"] != "done":
        return None
    if half == "choose":
        return result["nll"]
    losses = result.get(half, {}).get("sources", {}).get("all", {})
    return losses.get("threshold_nll", losses.get("nll"))


def pays(effect: PairedDifference | None) -> bool:
    """Whether three seeds speak for keeping a part: large enough, and the interval excludes zero."""
    complete = effect is not None and effect.seeds == len(FIRST)
    return complete and effect.mean <= -LEAST_GAIN and effect.excludes_zero


def verdict(first: PairedDifference | None, fresh: PairedDifference | None, stays: bool = False) -> str:
    """Return what becomes of a part: kept, deleted, undecided or not run; of what stays anyway, whether it pays."""
    deleted = "does not pay" if stays else "deleted"
    if first is None:
        return "not run"
    if first.seeds == 1 and first.mean > _DROPPED_ABOVE:
        return f"{deleted}: seed 0 alone speaks against it"
    if first.seeds < len(FIRST):
        return f"undecided: {first.seeds} of {len(FIRST)} seeds"
    if first.mean > -LEAST_GAIN:
        return f"{deleted}: less than {LEAST_GAIN}"
    if not first.excludes_zero:
        return "undecided: the interval holds zero"
    if stays:
        return "**pays**"
    if fresh is None or fresh.seeds < len(FRESH):
        return "undecided: not repeated"
    return "**kept**" if pays(fresh) else "deleted: fresh seeds do not repeat it"

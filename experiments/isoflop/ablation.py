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
    deleted: tuple[Family, ...] = ()
    """Families in which no code computes it any longer: their results are told, and they are not run again."""
    repeated: bool = True
    """Whether it must be seen again with fresh seeds to be kept; not optimisers, growth and gates, which stay."""


PARTS = (
    Part("adamw", "Muon instead of AdamW", {"optimizer.kind": "adamw"}, replaces=True, repeated=False),
    Part(
        "growth-0.5",
        "growth: one pass for half of the steps, then routed",
        {"train.growth": [{"share": 0.5, "num_recursions": 1}]},
        ("mor",),
        repeated=False,
    ),
    Part("qk-norm", "QK-norm", {"model.parts.qk_norm": True}),
    Part("value-residual", "value residual", {"model.parts.value_residual": True}, deleted=("mor",)),
    Part("low-capacity", "capacities 1, 0.5, 0.25", {"model.routing.capacities": [1.0, 0.5, 0.25]}, ("mor",)),
    Part("softcap", "logit soft-cap at 30", {}, deleted=FAMILIES),
    Part(
        "paper-gate",
        "the plain gate, alpha 2, instead of the paper's",
        {"model.routing.residual": "paper", "model.routing.alpha": 0.1},
        ("mor",),
        replaces=True,
        repeated=False,
    ),
    Part(
        "growth-0.7",
        "growth: one pass for 0.7 of the steps, then routed",
        {"train.growth": [{"share": 0.7, "num_recursions": 1}]},
        ("mor",),
        repeated=False,
    ),
    Part("no-aux-loss", "no auxiliary loss", {"model.routing.sampling": "none"}, ("mor",)),
    Part("unshared-norms", "norms of its own for every pass", {"model.recursion.share_norms": False}, ("mor",)),
    Part("lora-8", "LoRA of rank 8 for every pass", {"model.recursion.relaxation.lora_rank": 8}, ("mor",)),
    Part("lower-capacity", "capacities 1, 0.25, 0.125", {"model.routing.capacities": [1.0, 0.25, 0.125]}, ("mor",)),
    Part("residual-learned", "residual scale learned per pass", {}, ("mor",), deleted=FAMILIES),
    Part("encoding", "recursion encoding", {"model.recursion.relaxation.encoding": True}, ("mor",)),
    Part("zero-init", "zero-initialised output projections", {}, deleted=FAMILIES),
    Part("residual-depth", "residual scale 1 / sqrt(N_r L)", {}, deleted=FAMILIES),
    Part("width-init", "initial standard deviation sqrt(2 / (5 d_model))", {}, deleted=FAMILIES),
    Part("injection", "re-injection of the embedding before every pass", {}, ("mor",), deleted=FAMILIES),
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
    _made: dict[str, SweepRun] = field(default_factory=dict, init=False, repr=False, compare=False)
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
        kept: list[tuple[Part, Family]] = [
            (part, family)
            for part, family in self.tested()
            if part.repeated and pays(self.effect(results, part, family, FIRST))
        ]
        bases: list[tuple[Part, Family]] = [(BASE, f) for f in FAMILIES if any(f == of for _, of in kept)]
        return [self.at_best(results, family, part, seed) for part, family in bases + kept for seed in FRESH]

    def tested(self) -> Iterator[tuple[Part, Family]]:
        """Yield every part with every family that it can be run in."""
        return ((part, family) for part in self.parts for family in part.families if family not in part.deleted)

    def run(self, family: Family, part: Part, seed: int, width: int, rate: float) -> SweepRun:
        """Return one run; its name says all that it depends on."""
        name = name_of(family, part, seed, width, rate)
        if name not in self._made:
            changes = {**part.changes, "optimizer.learning_rate": rate}
            config = configured(self.scale, family, width, changes, self.corpus)
            (self._made[name],) = seeded(name.removesuffix(f"-s{seed}"), config, (seed,))
        return self._made[name]

    def at_best(self, results: Mapping[str, Result], family: Family, part: Part, seed: int) -> SweepRun:
        """Return a run at its family's best width and at the best rate of its optimiser, as far as they are known."""
        return self.run(family, part, seed, *self.best(results, family, part))

    def best(self, results: Mapping[str, Result], family: Family, part: Part) -> tuple[int, float]:
        """Return the best width of a family, and the best rate of a part's optimiser, as far as they are known."""
        scale = scale_of(self.scale)
        middle = scale.widths[family][1]
        optimizer = part if part.name == "adamw" else BASE
        widths = {width: name_of(family, BASE, 0, width, scale.rate) for width in scale.widths[family]}
        rates = {
            factor * scale.rate: name_of(family, optimizer, 0, middle, factor * scale.rate)
            for factor in (1.0, 0.5, 2.0)
        }
        return _best(results, widths, middle), _best(results, rates, scale.rate)

    def effect(
        self, results: Mapping[str, Result], part: Part, family: Family, seeds: tuple[int, ...], half: str = "choose"
    ) -> PairedDifference | None:
        """Return what a part changes in the causal loss, seed by seed; None if it was not run with any of them."""
        of_part, of_base = (self._losses(results, family, which, seeds, half) for which in (part, BASE))
        return paired_difference(of_base, of_part) if part.replaces else paired_difference(of_part, of_base)

    def _losses(
        self, results: Mapping[str, Result], family: Family, part: Part, seeds: tuple[int, ...], half: str
    ) -> dict[int, float]:
        best = self.best(results, family, part)
        losses = {seed: loss_on(results.get(name_of(family, part, seed, *best)), half) for seed in seeds}
        return {seed: loss for seed, loss in losses.items() if loss is not None}


def name_of(family: Family, part: Part, seed: int, width: int, rate: float) -> str:
    """Return the name of a run."""
    return f"{family}-d{width}-lr{rate:g}-{part.name}-s{seed}"


def _best(results: Mapping[str, Result], names: Mapping[_K, str], default: _K) -> _K:
    """The key whose run has the lowest loss; the default where none is finished."""
    losses = {key: loss for key, name in names.items() if (loss := loss_on(results.get(name))) is not None}
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
    if effect is None or effect.seeds < len(FIRST):
        return False
    return effect.mean <= -LEAST_GAIN and effect.excludes_zero


def verdict(first: PairedDifference | None, fresh: PairedDifference | None, repeated: bool = True) -> str:
    """Return what becomes of a part: it pays, does not, is undecided or was not run."""
    if first is None:
        return "not run"
    if first.seeds == 1 and first.mean > _DROPPED_ABOVE:
        return "does not pay: seed 0 alone speaks against it"
    if first.seeds < len(FIRST):
        return f"undecided: {first.seeds} of {len(FIRST)} seeds"
    if first.mean > -LEAST_GAIN:
        return f"does not pay: less than {LEAST_GAIN}"
    if not first.excludes_zero:
        return "undecided: the interval holds zero"
    if repeated and (fresh is None or fresh.seeds < len(FRESH)):
        return "undecided: not repeated"
    return "**pays**" if not repeated or pays(fresh) else "does not pay: fresh seeds do not repeat it"

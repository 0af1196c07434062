"""The runs of a scale, the most telling first, so that any first part of them is worth having.

1. every family at the first N_r, seed 0, on the first two tasks (pointers, S3): the figures of one seed;
2. seeds 1 and 2 of these: what of them holds;
3. the other tasks, seed 0;
4. equal FLOPs: what takes fewer than the deep model trains for as many, all seeds, on the first two tasks;
5. the other N_r on the first task, seed 0;
6. seeds 1 and 2 of the other tasks.
"""

from collections.abc import Iterator, Sequence

from reasoners import FAMILIES, configured, scale_of

from mor_jax.sweep.recipes import seeded
from mor_jax.sweep.runs import SweepRun

SEEDS = (0, 1, 2)
CHEAPER = ("shallow", "expert", "token", "grown", "drawn")
"""Families that take fewer training FLOPs a token than the deep model; the recursive one takes as many."""
_OF_ALL_PASSES = ("deep", "recursive", "expert", "drawn")


def ranked_runs(scale: str) -> list[SweepRun]:
    """Return the runs of a scale in their order; none twice."""
    found: dict[str, SweepRun] = {}
    for run in _in_order(scale):
        found.setdefault(run.name, run)
    return list(found.values())


def _in_order(scale: str) -> Iterator[SweepRun]:
    tasks = list(scale_of(scale).widths)
    recursions, *others = scale_of(scale).recursions
    first, rest = tasks[:2], tasks[2:]
    yield from _runs(scale, first, FAMILIES, (recursions,), SEEDS[:1])
    yield from _runs(scale, first, FAMILIES, (recursions,), SEEDS)
    yield from _runs(scale, rest, FAMILIES, (recursions,), SEEDS[:1])
    yield from _runs(scale, first, CHEAPER, (recursions,), SEEDS, equal_flops=True)
    yield from _runs(scale, first[:1], _OF_ALL_PASSES, others, SEEDS[:1])
    yield from _runs(scale, rest, FAMILIES, (recursions,), SEEDS)


def _runs(
    scale: str,
    tasks: Sequence[str],
    families: Sequence[str],
    recursions: Sequence[int],
    seeds: Sequence[int],
    *,
    equal_flops: bool = False,
) -> Iterator[SweepRun]:
    for seed in seeds:
        for task in tasks:
            for passes in recursions:
                for family in families:
                    config = configured(scale_of(scale), task, family, passes, equal_flops=equal_flops)
                    yield from seeded(group_name(task, family, passes, equal_flops=equal_flops), config, (seed,))


def group_name(task: str, family: str, recursions: int, *, equal_flops: bool = False) -> str:
    """Return the name of a run less its seed."""
    depth = "" if family == "shallow" and not equal_flops else f"-r{recursions}"
    return f"{task}-{family}{depth}{'-equal-flops' if equal_flops else ''}"

"""Tables of docs/results.md that set the paper's effects beside ours, and what they leave open."""

from collections import Counter
from collections.abc import Mapping, Sequence

from claims import CLAIMS, Claim
from report_tables import Result

from mor_jax.sweep.paired import PairedDifference, paired_difference
from mor_jax.sweep.table import group_summary

_AGREES, _OPPOSES, _OPEN = "yes", "**no**", "undecided"
_ORDER = (_AGREES, _OPPOSES, _OPEN)


def claims_table(results: Mapping[str, Sequence[Result]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the paper's effects beside ours at one scale: what agrees, what does not, what is undecided.

    Args:
        results: of one scale, by experiment.
        claims: the paper's effects.
    """
    rows = [
        [claim.says, f"{claim.paper:+.4f} ({claim.table})", *_effect_cells(results, claim)]
        for claim in claims
        if was_run(results, claim)
    ]
    rows.sort(key=lambda row: _ORDER.index(_verdict(row)))  # stable: the claims' own order within a verdict
    lines = [
        "| claim | paper (table) | ours, causal [95% interval] | ours, topk | seeds | agrees in direction |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    counts = Counter(_verdict(row) for row in rows)
    summary = (
        f"{counts[_AGREES]} agree, {counts[_OPPOSES]} do not, {counts[_OPEN]} are undecided, "
        f"{len(claims) - len(rows)} were not run here."
    )
    return f"{summary}{_seed_spread(results)}\n\n" + "\n".join(lines) + "\n"


def not_run(by_scale: Sequence[Mapping[str, Sequence[Result]]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the claims that were not run at any of some scales, by experiment; empty if all were."""
    missing: dict[str, list[str]] = {}
    for claim in claims:
        if not any(was_run(results, claim) for results in by_scale):
            missing.setdefault(claim.experiment, []).append(claim.says)
    lines = [f"- {experiment}: {'; '.join(says)}" for experiment, says in missing.items()]
    return "Claims not run at any scale:\n\n" + "\n".join(lines) + "\n" if lines else ""


def was_run(results: Mapping[str, Sequence[Result]], claim: Claim) -> bool:
    """Whether both sides of a claim are finished for a common seed."""
    return any(_difference(results, claim, figure) is not None for figure in ("nll", "topk_nll"))


def _verdict(row: Sequence[str]) -> str:
    return row[-1].split(":")[0].removesuffix(" (topk)")


def _difference(results: Mapping[str, Sequence[Result]], claim: Claim, figure: str) -> PairedDifference | None:
    """Effect of a claim in one loss over the seeds that both sides finished: those runs saw the same batches."""
    ours, base = (
        {
            run["seed"]: loss
            for run in results.get(claim.experiment, ())
            if run["group"] == group and run["state"] == "done" and (loss := _loss(run, figure)) is not None
        }
        for group in (claim.group, claim.baseline)
    )
    return paired_difference(ours, base)


def _loss(run: Result, figure: str) -> float | None:
    """The causal loss, or that by top-k, which is the only one of a model without a router."""
    return run.get("topk_nll", run.get("nll")) if figure == "topk_nll" else run.get("nll")


def _seed_spread(results: Mapping[str, Sequence[Result]]) -> str:
    """Say how far seeds alone move the causal loss of a group; empty where every group has one."""
    groups = [row for rows in results.values() for row in group_summary(rows) if "nll_spread" in row]
    if not groups:
        return ""
    widest = max(groups, key=lambda row: row["nll_spread"])
    return (
        f" Runs that differ in the seed only spread by up to {widest['nll_spread']:.4f} (standard deviation of "
        f"{widest['seeds']} seeds, {widest['group']})."
    )


def _effect_cells(results: Mapping[str, Sequence[Result]], claim: Claim) -> list[str]:
    """Causal effect with its interval, effect by topk, seeds and verdict."""
    causal, ahead = (_difference(results, claim, figure) for figure in ("nll", "topk_nll"))
    topk = "" if ahead is None else f"{ahead.mean:+.4f}"
    if causal is not None:
        return [str(causal), topk, str(causal.seeds), _agrees(claim.paper, causal)]
    assert ahead is not None
    return ["no causal boundary", topk, str(ahead.seeds), _agrees(claim.paper, ahead) + " (topk)"]


def _agrees(paper: float, effect: PairedDifference) -> str:
    """Compare directions, if the interval of ours says which it has."""
    if effect.half_width is None:
        return f"{_OPEN}: one seed"
    if not effect.excludes_zero:
        return f"{_OPEN}: the interval holds zero"
    return _AGREES if paper * effect.mean > 0 else _OPPOSES

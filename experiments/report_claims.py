"""Tables of docs/results.md that set the paper's effects beside ours, and what they leave open."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from claims import CLAIMS, Claim
from report_tables import Result

from mor_jax.sweep.table import group_summary

_AGREES, _OPPOSES, _OPEN = "yes", "**no**", "undecided"
_ORDER = (_AGREES, _OPPOSES, _OPEN)


def claims_table(results: Mapping[str, Sequence[Result]], claims: Sequence[Claim] = CLAIMS) -> str:
    """Return the paper's effects beside ours at one scale: what agrees, what does not, what is undecided.

    Args:
        results: of one scale, by experiment.
        claims: the paper's effects.
    """
    noise = seed_noise(results)
    rows = []
    for claim in claims:
        if was_run(results, claim):
            cells = _effect_cells(claim, *_with_common_seeds(results[claim.experiment], claim), noise)
            rows.append([claim.says, f"{claim.paper:+.4f} ({claim.table})", *cells])
    rows.sort(key=lambda row: _ORDER.index(_verdict(row)))  # stable: the claims' own order within a verdict
    lines = [
        "| claim | paper (table) | ours, causal | ours, topk | seeds | agrees in direction |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    counts = Counter(_verdict(row) for row in rows)
    summary = (
        f"{counts[_AGREES]} agree, {counts[_OPPOSES]} do not, {counts[_OPEN]} are undecided, "
        f"{len(claims) - len(rows)} were not run here."
    )
    spread = f" Runs that differ in the seed only spread by up to {noise:.4f} (standard deviation)." if noise else ""
    return f"{summary}{spread}\n\n" + "\n".join(lines) + "\n"


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
    return all(row.get("seeds") for row in _with_common_seeds(results.get(claim.experiment, ()), claim))


def _verdict(row: Sequence[str]) -> str:
    return row[-1].split(":")[0].removesuffix(" (topk)")


def _with_common_seeds(results: Sequence[Result], claim: Claim) -> tuple[Result, Result]:
    """Summaries of the two groups over the seeds that both finished: those runs saw the same batches."""
    pair = (claim.group, claim.baseline)
    done = {group: {r["seed"]: r for r in results if r["group"] == group and r["state"] == "done"} for group in pair}
    common = done[claim.group].keys() & done[claim.baseline].keys()
    summaries = [group_summary([r for seed, r in done[group].items() if seed in common]) for group in pair]
    ours, base = (summary[0] if summary else {} for summary in summaries)
    return ours, base


def seed_noise(results: Mapping[str, Sequence[Result]]) -> float:
    """Return the largest standard deviation of the causal loss between seeds; 0 where every group has one."""
    return max((row.get("nll_spread", 0.0) for rows in results.values() for row in group_summary(rows)), default=0.0)


def _effect_cells(claim: Claim, ours: Result, base: Result, noise: float) -> list[str]:
    """Causal effect, effect by topk, seeds and verdict."""
    seeds = str(ours["seeds"])
    ahead = _look_ahead(ours) - _look_ahead(base) if _look_ahead(ours) and _look_ahead(base) else math.nan
    topk = "" if math.isnan(ahead) else f"{ahead:+.4f}"
    if "nll" not in ours or "nll" not in base:
        return ["no causal boundary", topk, seeds, _agrees(claim.paper, ahead, 0.0, noise) + " (topk)"]
    effect = ours["nll"] - base["nll"]
    error = _standard_error(ours, base)
    spread = f" ± {error:.4f}" if error else ""
    return [f"{effect:+.4f}{spread}", topk, seeds, _agrees(claim.paper, effect, error, noise)]


def _look_ahead(row: Result) -> float:
    """Loss by top-k; without a router there is only one loss."""
    return row.get("topk_nll", row.get("nll", 0.0))


def _standard_error(ours: Result, base: Result) -> float:
    """Of the difference of two means over seeds; 0 where either has one seed only."""
    if "nll_spread" not in ours or "nll_spread" not in base:
        return 0.0
    return math.sqrt(ours["nll_spread"] ** 2 / ours["seeds"] + base["nll_spread"] ** 2 / base["seeds"])


def _agrees(paper: float, effect: float, error: float, noise: float) -> str:
    """Compare directions; a difference of two single runs tells nothing below what seeds alone do."""
    if error and abs(effect) < 2 * error:
        return f"{_OPEN}: within two standard errors of none"
    if not error and abs(effect) < math.sqrt(2) * noise:
        return f"{_OPEN}: {'same' if paper * effect > 0 else 'opposite'} sign, within the spread of seeds"
    return _AGREES if paper * effect > 0 else _OPPOSES

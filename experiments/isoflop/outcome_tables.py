"""Tables of what the comparison came to, as Markdown; what was not run says so."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from choices import INNER, paired
from comparison import CONFIRMING, TRIES
from families import FAMILIES, VARIANTS, Name
from measured import Measured, Result, family_of, mean_passes, reported

PLAIN_LOOPING = 0.46
"""Value of a pass in plain looping, arXiv 2604.21106."""
_NOT_RUN = "not run"
Moved = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""Loss by run, held-out half, and `before` or `now`."""


def tables(measured: Measured, moved: Moved | None = None) -> str:
    """Return all tables as Markdown.

    Args:
        measured: the results.
        moved: losses of runs that were made again, from `again.py`.
    """
    parts = {
        "What was run": _run_table(measured),
        "Rates": _rates(measured),
        "Variants": _variants(measured),
        "Each family over its sizes": _isoflop(measured),
        "Each family at its best": _best(measured),
        "Paired differences": _differences(measured),
        "The value of a pass": _law(measured),
        "Loss by source": _sources(measured),
        "Tries": _tries(measured),
        "Confirmation": _confirmation(measured),
    }
    if moved:
        parts["Made again"] = _made_again(moved)
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def _run_table(measured: Measured) -> str:
    rows = [["rank", "stage", "finished", "not finished"]]
    for rank, (stage, runs) in enumerate(measured.comparison.stages(measured.results).items(), 1):
        states = [measured.results.get(run.name, {"state": _NOT_RUN})["state"] for run in runs]
        others = {state: states.count(state) for state in dict.fromkeys(states) if state != "done"}
        missing = ", ".join(f"{count} {state}" for state, count in others.items())
        wins = stage == TRIES and measured.comparison.mor_wins(measured.results)
        none = "none: MoR beats vanilla" if wins else "not decided on yet"
        rows.append([str(rank), stage, f"{states.count('done')} of {len(runs)}", missing if runs else none])
    names = [
        f"{run.name}"
        for run in measured.comparison.plan(measured.results)
        if measured.results.get(run.name, {"state": _NOT_RUN})["state"] != "done"
    ]
    return markdown(rows) + (f"\nNot finished, by rank: {', '.join(names)}.\n" if names else "")


def _rates(measured: Measured) -> str:
    comparison, rows = measured.comparison, [["family", "budget", "peak rate: loss on `choose`", "taken"]]
    for family in FAMILIES:
        for budget, (runs, best) in enumerate(
            (comparison.swept(measured.results, family), comparison.checked(measured.results, family))
        ):
            if runs:
                tried = sorted((r.config.optimizer.learning_rate, _chosen_on(measured, r.name)) for r in runs)
                cells = ", ".join(f"{rate:g}: {loss}" for rate, loss in tried)
                rows.append([family, f"{comparison.budgets[budget]:.2g}", cells, "" if best is None else f"{best:g}"])
    return markdown(rows)


def _variants(measured: Measured) -> str:
    comparison, rows = measured.comparison, [["variant", "loss on `choose` at three widths, smallest budget", ""]]
    for family in FAMILIES:
        best = comparison.variant(measured.results, family)
        for variant in comparison.tried(measured.results, family):
            runs = comparison.some_sizes(measured.results, variant, 0, INNER)
            cells = ", ".join(f"{run.config.model.d_model}: {_chosen_on(measured, run.name)}" for run in runs)
            taken = "taken" if best is not None and best.name == variant.name else ""
            rows.append([variant.name, cells or _NOT_RUN, taken])
    return markdown(rows)


def _chosen_on(measured: Measured, name: str) -> str:
    result = measured.results.get(name, {"state": _NOT_RUN})
    return f"{result['nll']:.4f}" if result["state"] == "done" else result["state"]


def _isoflop(measured: Measured) -> str:
    rows = [["family", "budget", "N*: parameters without embedding [90%]", "tokens for each", "L* [90%]"]]
    exponents = [["family", "N* ~ C^a: a [90%]", "L* ~ C^b: b [90%]"]]
    for family in FAMILIES:
        fit, refused = measured.isoflop(family)
        for index, budget in enumerate(measured.comparison.budgets):
            head = [family, f"{budget:.2g}"]
            if fit is None or budget not in fit.parabolas:
                rows.append([*head, refused.get(budget, ""), "", ""])
                continue
            best = fit.parabolas[budget]
            size = _with_band(best.size / 1e6, fit.size_bands.get(budget), "{:.2f}", 1e6) + " million"
            each = _tokens_at(measured, family, index, best.size) / best.size
            rows.append([*head, size, f"{each:.1f}", _with_band(best.loss, fit.loss_bands.get(budget), "{:.4f}")])
        if fit is not None and fit.path is not None and fit.losses is not None:
            of_size = _with_band(fit.path.exponent, fit.exponent_band, "{:.3f}")
            exponents.append([family, of_size, _with_band(fit.losses.exponent, fit.loss_exponent_band, "{:.4f}")])
    exponents = exponents if len(exponents) > 1 else [["exponents need two budgets"]]
    noise = "" if measured.noise is None else f"\nSeeds of a run spread by {measured.noise:.4f} (pooled), as the bands "
    return markdown(rows) + "\n" + markdown(exponents) + (noise and noise + "assume. Parabolas are of seed 0.\n")


def _tokens_at(measured: Measured, family: Name, budget: int, size: float) -> float:
    """Tokens that the budget buys at a size between the sizes that were run, by interpolation of the logarithms."""
    done = measured.done(measured.comparison.sizes(measured.results, family, budget))
    sizes, tokens = zip(*sorted((r["non_embedding"], r["tokens"]) for r in done), strict=True)
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(tokens))))


def _made_again(moved: Moved) -> str:
    rows = [["run", "`choose`, before", "now", "`report`, before", "now"]]
    for name, halves in moved.items():
        losses = [halves[half][when] for half in ("choose", "report") for when in ("before", "now")]
        rows.append([name, *(_NOT_RUN if loss is None else f"{loss:.4f}" for loss in losses)])
    return "The embedding's gradient summed in bfloat16 (before) and in float32 (now):\n\n" + markdown(rows)


def _best(measured: Measured) -> str:
    rows = [
        [
            "model",
            "parameters",
            "without embedding",
            "tokens",
            "mean passes",
            "serving FLOPs/token",
            "KV bytes/token",
            "causal loss (± sd)",
            "seeds",
        ]
    ]
    rows += [_model_row(measured.at_best(family)) or [family, _NOT_RUN, *[""] * 7] for family in FAMILIES]
    return f"At {measured.comparison.budgets[-1]:.2g} training FLOPs:\n\n{markdown(rows)}"


def at_budget(measured: Measured, budget: int) -> tuple[str, dict[str, float]]:
    """Tell every family's best size at a budget, and the best plain model of MoR's unique layers (N_r = 3) if there is.

    Args:
        measured: the results.
        budget: its index.

    Returns:
        (table, loss less vanilla's on `report` by the run's group); nothing while vanilla has no best size.
    """
    comparison, results = measured.comparison, measured.results
    plain = comparison.some_sizes(results, VARIANTS["vanilla-l4"], budget, INNER)
    best: list[Result] = []
    for runs in (*(comparison.at_best(results, family, budget=budget) for family in FAMILIES), plain):
        best += sorted(measured.done(runs), key=lambda result: result["nll"])[:1]
    if not best or family_of(best[0]) != "vanilla":
        return "", {}
    behind: dict[str, float] = {}
    rows = [["model", "unique parameters without embedding", "tokens for each", "mean passes", "serving FLOPs/token"]]
    rows[0] += ["KV bytes/token", "causal loss", "less vanilla"]
    for result in best:
        loss = reported(result)
        behind[result["group"]] = loss - reported(best[0])
        size, passes = result["non_embedding"], f"{mean_passes(result):.2f}"
        costs = (f"{result['serving_flops_per_token'] / 1e6:.1f}M", f"{result['kv_bytes_per_token']:.0f}")
        rows.append([result["group"], f"{size / 1e6:.2f}M", f"{result['tokens'] / size:.1f}", passes, *costs])
        rows[-1] += [f"{loss:.4f}", f"{behind[result['group']]:+.4f}"]
    return markdown(rows), behind


def _model_row(seeds: Sequence[Result]) -> list[str]:
    if not seeds:
        return []
    first, losses = seeds[0], [result["report"]["sources"]["all"] for result in seeds]
    causal = [loss.get("threshold_nll", loss.get("nll")) for loss in losses]
    spread = f" ± {statistics.stdev(causal):.4f}" if len(causal) > 1 else ""
    millions = [f"{first[key] / 1e6:.2f}M" for key in ("parameters", "non_embedding", "tokens")]
    costs = [f"{mean_of(seeds, key):.4g}" for key in ("serving_flops_per_token", "kv_bytes_per_token")]
    passes = f"{statistics.fmean(map(mean_passes, seeds)):.2f}"
    return [first["group"], *millions, passes, *costs, f"{statistics.fmean(causal):.4f}{spread}", str(len(seeds))]


def _differences(measured: Measured) -> str:
    rows = [["", "`report` [95%]", "`choose` [95%]"]]
    pairs: tuple[tuple[Name, Name], ...] = (
        ("mor", "vanilla"),
        ("grown", "vanilla"),
        ("recursive", "vanilla"),
        ("mor", "recursive"),
        ("grown", "mor"),
    )
    for family, base in pairs:
        halves = (measured.comparison.difference(measured.results, family, base, h) for h in ("report", "choose"))
        rows.append([f"{family} less {base}", *map(with_seeds, halves)])
    return f"Each at its best size, {measured.comparison.budgets[-1]:.2g} training FLOPs:\n\n{markdown(rows)}"


def _law(measured: Measured) -> str:
    found = measured.law()
    if isinstance(found, str):
        return f"Not fitted: {found}.\n"
    law, band = found.law, found.phi_band
    return (
        f"L = E + A (N_once + r^phi N_shared)^-alpha + B D^-beta, N and D in millions: phi = {law.phi:.2f} "
        f"[{band.low:.2f}, {band.high:.2f}] (95%, {found.samples} bootstrap samples of runs), beside {PLAIN_LOOPING} "
        f"for plain looping (arXiv 2604.21106). E = {law.irreducible:.3f}, log A = {law.log_a:.3f}, alpha = "
        f"{law.alpha:.3f}, log B = {law.log_b:.3f}, beta = {law.beta:.3f}; residual {found.residual:.4f} nats. r is "
        "the mean passes of the trained model; a grown model took fewer while it grew.\n"
    )


def _sources(measured: Measured) -> str:
    best = {family: seeds for family in FAMILIES if (seeds := measured.at_best(family))}
    texts = ("report", "val")
    sources = [(t, s) for t in texts for s in dict.fromkeys(_sources_of(best.values(), t))]
    rows = [["source", *best]]
    for text, source in sources:
        cells = []
        for seeds in best.values():
            losses = [r[text]["sources"][source] for r in seeds if source in r.get(text, {}).get("sources", {})]
            causal = [loss.get("threshold_nll", loss.get("nll")) for loss in losses]
            cells.append(f"{statistics.fmean(causal):.4f}" if causal else "")
        rows.append([f"{text}: {source}", *cells])
    return markdown(rows) if best else f"{_NOT_RUN}\n"


def _sources_of(groups: Any, text: str) -> Iterator[str]:
    for seeds in groups:
        for result in seeds:
            yield from result.get(text, {}).get("sources", {})


def _tries(measured: Measured) -> str:
    comparison, results = measured.comparison, measured.results
    leaders = comparison.leaders(results)
    if not any(_tried(measured, family) for family in leaders):
        return f"{'None: MoR beats vanilla' if comparison.mor_wins(results) else _NOT_RUN}.\n"
    rows = [["family", "change", "effect on `choose`, seed 0", "best size, largest budget, `report` [95%]"]]
    for family in leaders:
        tried = comparison.tries(results, family)
        what, runs = comparison.best_try(results, family)
        for name, run in list(tried.items())[1:]:
            effect = paired(results, [run], [tried[""]], "choose")
            went_on = what is not None and what.name == name
            later = paired(results, runs, comparison.at_best(results, family, range(6)), "report") if went_on else None
            rows.append([family, name, "" if effect is None else str(effect), with_seeds(later) if went_on else ""])
    return markdown(rows)


def _tried(measured: Measured, family: Name) -> bool:
    runs = list(measured.comparison.tries(measured.results, family).values())[1:]
    return bool(measured.done(runs))


def _confirmation(measured: Measured) -> str:
    runs = measured.comparison.stages(measured.results)[CONFIRMING]
    groups: dict[str, list[Any]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    rows = [["model", "parameters", "tokens", "mean passes", "causal loss (± sd)", "seeds", "less vanilla-l8 [95%]"]]
    base = next((own for name, own in groups.items() if name.startswith("vanilla-l8-")), [])
    for name, own in groups.items():
        row = _model_row(measured.done(own))
        if not row:
            rows.append([name, _NOT_RUN, *[""] * 5])
            continue
        difference = "" if own is base else with_seeds(paired(measured.results, own, base, "report"))
        rows.append([row[0], row[1], row[3], row[4], row[7], row[8], difference])
    return markdown(rows) if groups else f"{_NOT_RUN}: the rates are not known yet.\n"


def mean_of(results: Sequence[Result], key: str) -> float:
    """Return the mean of a figure over seeds."""
    return statistics.fmean(result[key] for result in results)


def with_seeds(difference: Any) -> str:
    """Return a paired difference with its interval and number of seeds."""
    if difference is None:
        return _NOT_RUN
    return f"{difference} ({difference.seeds} seed{'s' * (difference.seeds > 1)})"


def _with_band(value: float, band: Any, form: str, unit: float = 1.0) -> str:
    text = form.format(value)
    return text if band is None else f"{text} [{form.format(band.low / unit)}, {form.format(band.high / unit)}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, its first row the head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"

"""The runs of all experiments in order of importance: what to finish first where time on a device is short.

Experiments ask for the same run under several names (the vanilla model of one budget is in six of them); it is made
once. ``python experiments/run_ranked.py`` runs the list, ``spread`` puts what came out into the experiments' results.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mor_jax.config import PerfConfig
from mor_jax.config import io as config_io
from mor_jax.sweep.isoflop import with_scaled_steps
from mor_jax.sweep.results import failed_result, write_json
from mor_jax.sweep.runs import SweepRun, load_sweep

HERE = Path(__file__).parent
Result = Mapping[str, Any]

_MAIN = ("vanilla", "expert-r3", "recursive-r3")
RANKED = (
    *(("mor_vs_baselines", f"{group}-s{seed}") for seed in (0, 1, 2) for group in _MAIN),
    ("mor_vs_baselines", "expert-r2-s0"),
    ("mor_vs_baselines", "token-r3-s0"),
    ("mor_vs_baselines", "expert-r3-share-s0"),
    ("mor_vs_baselines", "recursive-r2-s0"),
    ("sharing", "cycle-r2-s0"),
    ("sharing", "sequence-r2-s0"),
    ("sharing", "middle_sequence-r2-s0"),
    ("learning_rate", "vanilla-lr0.001-s0"),
    ("learning_rate", "expert-r2-lr0.001-s0"),
    ("mor_vs_baselines", "expert-r3-equal-tokens-s0"),
    ("routers", "expert-loss-0.1-s0"),
    ("closing_the_gap", "plain-alpha-2-s0"),
    ("routers", "expert-aux-router-s0"),
    ("routers", "expert-random-s0"),
    ("mor_vs_baselines", "expert-r2-s1"),
    ("mor_vs_baselines", "expert-r2-s2"),
    ("kv_sharing", "expert-shared-s0"),
    ("kv_sharing", "expert-shared_update-s0"),
    ("routers", "expert-loss-0.01-s0"),
    ("closing_the_gap", "plain-alpha-1-s0"),
    ("test_time_scaling", "expert-r4-s0"),
    ("routers", "expert-mlp-s0"),
    *(("closing_the_gap", f"plain-alpha-{alpha}-s{seed}") for seed in (1, 2) for alpha in (1, 2)),
    ("closing_the_gap", "paper-loss-0.01-s0"),
    ("closing_the_gap", "plain-alpha-2-loss-0.01-s0"),
    ("capacity", "low-s0"),
    ("capacity", "high-s0"),
    ("capacity", "warm-up-s0"),
)
"""(experiment, run), most important first: MoR, recursive and vanilla over seeds; then one change at a time."""
_LARGE = (("mor_vs_baselines", "vanilla"), ("mor_vs_baselines", "expert-r3"), ("closing_the_gap", "plain-alpha-2"))
RANKED_LARGE = (
    *((experiment, f"{group}-s{seed}") for seed in (0, 1, 2) for experiment, group in _LARGE),
    ("learning_rate", "vanilla-lr0.003-s0"),
    ("mor_vs_baselines", "recursive-r3-s0"),
)
"""The same at scale `large`, where a run takes minutes: does what the best form of the gate gains at `long` last?"""
_LEAST_RUNS = 2
"""Finished runs from which on an experiment's results are written: one compares with nothing."""
_COMPARED_WITHIN = ("test_time_scaling",)
"""Experiments whose every run is compared with itself, at other depths."""


@dataclasses.dataclass(frozen=True)
class RankedRun:
    """A run of an experiment, under the name that is unique among all."""

    experiment: str
    run: SweepRun

    @property
    def placed(self) -> SweepRun:
        """The run as it is named in the common folder of all runs."""
        return dataclasses.replace(self.run, name=f"{self.experiment}.{self.run.name}")


def ranked_runs(scale: str, factor: float = 1.0, perf: PerfConfig | None = None) -> list[RankedRun]:
    """Return the runs of RANKED (of RANKED_LARGE at scale `large`), each configuration once.

    Args:
        scale: as of ``mor sweep``.
        factor: multiplies the steps of every run, so that equal FLOPs stay equal; warm-ups keep their share of them.
        perf: replaces the runs' own.
    """
    found: dict[str, RankedRun] = {}
    ranked = RANKED_LARGE if scale == "large" else RANKED
    sweeps = {name: experiment_runs(name, scale, factor, perf) for name in dict.fromkeys(name for name, _ in ranked)}
    for experiment, name in ranked:
        run = sweeps[experiment][name]
        found.setdefault(run_key(config_io.to_dict(run.config)), RankedRun(experiment, run))
    return list(found.values())


def experiment_runs(
    experiment: str, scale: str, factor: float = 1.0, perf: PerfConfig | None = None
) -> dict[str, SweepRun]:
    """Return the runs of one experiment by name, with scaled steps."""
    runs = {}
    for run in load_sweep(HERE / experiment / "sweep.py", scale):
        config = with_scaled_steps(run.config, factor)
        config = config if perf is None else dataclasses.replace(config, perf=perf)
        runs[run.name] = dataclasses.replace(run, config=config)
    return runs


def run_key(config: Mapping[str, Any]) -> str:
    """Return what two runs have in common that compute the same: all but names, folders and how it is executed."""
    train = {name: value for name, value in config["train"].items() if name not in ("runs", "name")}
    return json.dumps({**config, "train": train, "perf": None}, sort_keys=True)


def spread(results: Sequence[Result], scale: str, factor: float, folder: Path = HERE) -> list[Path]:
    """Write ``results/SCALE.json`` of every experiment that finished runs are of.

    Args:
        results: of ``run_ranked.py``.
        scale: of the runs.
        factor: of their steps.
        folder: experiments/, or where its like is to be written.

    Returns:
        The files written; a run under another name is a copy, and what is missing says 'not run'.
    """
    by_key = {run_key(result["config"]): result for result in results}
    written = []
    for path in sorted(HERE.glob("*/sweep.py")):
        runs = experiment_runs(path.parent.name, scale, factor).values()
        found = [(run, None if run.start else by_key.get(run_key(config_io.to_dict(run.config)))) for run in runs]
        least = 1 if path.parent.name in _COMPARED_WITHIN else _LEAST_RUNS
        if sum(result is not None and result["state"] == "done" for _, result in found) >= least:
            target = folder / path.parent.name / "results" / f"{scale}.json"
            write_json(target, [_row(run, result) for run, result in found])
            written.append(target)
    return written


def _row(run: SweepRun, result: Result | None) -> Result:
    """A run that starts from another is not what its configuration says, so it has no result here."""
    if result is None:
        return failed_result(run, "not run", "")
    names = {"name": run.name, "group": run.group or run.name}
    train = {**result["config"]["train"], "runs": run.config.train.runs}  # not the folder on the machine that ran it
    config = {**result["config"], "train": train}
    return {**{key: value for key, value in result.items() if key != "experiment"}, **names, "config": config}

"""Running a sweep: order, skipping, sharing, failures, and starts from earlier runs; training is a stand-in."""

import dataclasses
import json

import pytest

from mor_jax.errors import UserError
from mor_jax.runs.folder import claim_run_folder, run_folder
from mor_jax.sweep.execute import SweepOptions, placed, run_sweep
from mor_jax.sweep.recipes import expert, seeded, token, vanilla
from mor_jax.sweep.results import reaching_shares, read_result, serving_flops_per_token
from mor_jax.sweep.runs import Start, SweepRun, first_of_groups, load_sweep
from mor_jax.sweep.table import group_summary, group_table, markdown_table
from mor_jax.train.loop import DivergedError

VANILLA, EXPERT = vanilla("debug"), expert("debug", 2)


class Trainer:
    """Writes the metrics that a run of the name would have had, and remembers what it was asked for."""

    def __init__(self, nll=3.0, stops_at=None, diverges=()):
        self.names, self.nll, self.stops_at, self.diverges = [], nll, stops_at, diverges

    def __call__(self, config, *, initial_weights):
        name = config.train.name
        self.names.append(name)
        folder = claim_run_folder(config)
        if name in self.diverges:
            raise DivergedError("step 3 diverged: loss=nan")
        line = {"step": config.train.steps, "loss": 3.1, "validation_tokens": 10, "validation_bytes": 40}
        if name == self.stops_at:
            line["step"] = 1
        if config.model.routing.kind == "none":
            line |= {"validation_nll": self.nll, "validation_bits_per_byte": 1.0}
        else:
            line |= {
                "validation_threshold_nll": self.nll + config.train.seed,
                "validation_threshold_bits_per_byte": 1.1,
            }
            line |= {"validation_topk_nll": self.nll - 0.1, "validation_gap": 0.1 + config.train.seed}
            line |= {"validation_threshold_tokens_per_depth": [0.0, 0.25, 0.75]}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return folder


RUNS = [*seeded("vanilla", VANILLA), *seeded("expert", EXPERT, (0, 1))]


def test_one_seed_keeps_the_first_run_of_every_group():
    assert [run.name for run in first_of_groups([*RUNS, *seeded("other", VANILLA, (3,))])] == [
        "vanilla-s0",
        "expert-s0",
        "other-s3",
    ]
    late = SweepRun("late", VANILLA, start=Start("expert-s1", strategy="stepwise"))
    with pytest.raises(UserError, match="'late' starts from 'expert-s1', not the first of its group"):
        first_of_groups([*RUNS, late])


def test_every_run_is_done_once_and_reported_in_order(tmp_path):
    trainer = Trainer()
    results = run_sweep(RUNS, SweepOptions(tmp_path), train=trainer, measure=lambda folder: {"extra": folder.name})
    assert trainer.names == ["vanilla-s0", "expert-s0", "expert-s1"]
    assert [result["state"] for result in results] == ["done"] * 3
    assert [result["nll"] for result in results] == [3.0, 3.0, 4.0]  # the causal loss
    assert results[1]["extra"] == "expert-s0" and results[1]["topk_nll"] == pytest.approx(2.9)
    assert results[0]["train_flops"] > 0 and results[0]["machine"]["versions"]["jax"]
    assert str(tmp_path.parent) not in json.dumps(results[0]["config"])  # results are shared, folders are not
    again = run_sweep(RUNS, SweepOptions(tmp_path), train=trainer)
    assert again == results and len(trainer.names) == 3


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    stopped = run_sweep(RUNS, SweepOptions(tmp_path), train=Trainer(stops_at="expert-s0"))
    assert [result["state"] for result in stopped] == ["done", "unfinished", "not run"]
    assert stopped[1]["why"] == f"at step 1 of {EXPERT.train.steps}"
    rest = Trainer()
    assert [r["state"] for r in run_sweep(RUNS, SweepOptions(tmp_path), train=rest)] == ["done"] * 3
    assert rest.names == ["expert-s0", "expert-s1"]


def test_a_diverged_run_does_not_stop_the_others(tmp_path):
    results = run_sweep(RUNS, SweepOptions(tmp_path), train=Trainer(diverges=("vanilla-s0",)))
    assert [result["state"] for result in results] == ["diverged", "done", "done"]
    table = markdown_table(results)
    assert "diverged: step 3 diverged: loss=nan" in table and "| 3.0000 |" in table


def test_hosts_share_the_runs_and_keep_branches_with_their_trunk(tmp_path):
    pinned = dataclasses.replace(VANILLA, train=dataclasses.replace(VANILLA.train, pinned_steps=(4,)))
    runs = [SweepRun("a", pinned), SweepRun("b", VANILLA), SweepRun("c", VANILLA, start=Start("a", step=4))]
    made = []
    for index in (0, 1):
        trainer = Trainer(stops_at="c")
        (tmp_path / str(index) / "a" / "checkpoints" / "4").mkdir(parents=True)
        run_sweep(runs, SweepOptions(tmp_path / str(index), share=(index, 2)), train=trainer)
        made.append(trainer.names)
    assert made == [["a", "c"], ["b"]]
    assert (tmp_path / "0" / "c" / "checkpoints" / "4").is_dir()
    with pytest.raises(UserError, match="share=2/2"):
        SweepOptions(tmp_path, share=(2, 2))


def test_no_run_is_started_beyond_the_limit_and_a_claimed_one_is_left(tmp_path):
    results = run_sweep(RUNS, SweepOptions(tmp_path, limit_seconds=-1.0), train=Trainer())
    assert [result["state"] for result in results] == ["not run"] * 3
    assert "not run" in markdown_table(results)


def test_a_changed_configuration_is_refused(tmp_path):
    run_sweep(RUNS[:1], SweepOptions(tmp_path), train=Trainer())
    other = dataclasses.replace(RUNS[0], config=dataclasses.replace(VANILLA, model=EXPERT.model))
    with pytest.raises(UserError, match=r"another configuration: model.recursion.num_recursions: 1 -> 2"):
        run_sweep([other], SweepOptions(tmp_path), train=Trainer())


def test_seeds_are_averaged_with_their_spread(tmp_path):
    results = run_sweep(RUNS, SweepOptions(tmp_path), train=Trainer())
    vanilla_row, expert_row = group_summary(results)
    assert vanilla_row == {"group": "vanilla", "seeds": 1, "nll": 3.0, "bits_per_byte": 1.0}
    assert expert_row["nll"] == 3.5 and expert_row["nll_spread"] == pytest.approx(0.5**0.5)
    assert "| expert | 2 | 3.5000 ± 0.7071 |" in group_table(results)


def test_serving_flops_follow_the_depths_that_tokens_take():
    model = EXPERT.model
    assert reaching_shares(model, [0.0, 0.25, 0.75]) == (1.0, 0.75)
    full, half = (serving_flops_per_token(model, (1.0, share)) for share in (1.0, 0.5))
    dense = serving_flops_per_token(VANILLA.model, (1.0,))
    assert half < full == pytest.approx(dense, rel=0.01)  # the routers' products are the difference
    assert serving_flops_per_token(token("debug", 2).model, (1.0, 0.5)) == pytest.approx(half, rel=0.01)


def test_sweep_files(tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"runs": [{"name": "a", "set": {"train.steps": 10}}, {"name": "b", "group": "g"}]}))
    a, b = load_sweep(path)
    assert a.config.train.steps == 10 and b.group == "g" and placed(a, tmp_path).config.train.runs == str(tmp_path)
    assert run_folder(placed(a, tmp_path).config) == tmp_path / "a" and read_result(tmp_path / "a") is None
    for text, message in (
        ({"runs": [{"name": "a", "set": {"train.stepz": 1}}]}, "did you mean 'steps'"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs are called 'a'"),
        ({"runs": [{"name": "a", "start": {"run": "b", "step": 1}}]}, "does not stand before it"),
        ({"runs": [{"name": "a", "start": {"run": "b"}}]}, "exactly one of step"),
        ({"runs": [{"name": "a", "presett": "debug"}]}, "did you mean 'preset'"),
        ({"runs": [{"name": "a", "set": ["train.steps"]}]}, r"runs\[0\]: set=\['train.steps'\] is not an object"),
        ({"runs": [{"name": "a", "preset": 3}]}, "preset=3 is not a text"),
        ({"runs": [{"name": 3}]}, "name=3 is not a text"),
        ({"runs": [{"name": "a", "start": "b"}]}, "start='b' is not an object"),
        ({"runs": [{"name": "a", "start": {"step": 1}}]}, r"runs\[0\].start: run missing"),
        ({"runs": [{"name": "a", "start": {"run": "b", "strategy": "best"}}]}, "strategy='best' is not one of"),
        ({"runs": [{"name": ".."}]}, "the name '..' cannot be a folder's"),
        ({"runs": []}, "describes no runs"),
        ([], "has no list `runs`"),
    ):
        path.write_text(json.dumps(text))
        with pytest.raises(UserError, match=message):
            load_sweep(path)
    with pytest.raises(UserError, match="not a sweep file"):
        load_sweep(tmp_path / "absent.py")
    path = tmp_path / "sweep.py"
    for found in ("3", "['a']"):
        path.write_text(f"def runs(scale):\n    return {found}\n")
        with pytest.raises(UserError, match=r"runs\(\) gave .*, which is no list of SweepRun"):
            load_sweep(path)

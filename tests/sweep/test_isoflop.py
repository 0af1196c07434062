"""Plans: steps that spend a budget, and branches that begin where the learning rate still stands at its peak."""

import dataclasses

import pytest

from mor_jax import presets
from mor_jax.config import GrowthStage
from mor_jax.errors import UserError
from mor_jax.model.flops import paper_flops_per_token, run_flops, train_flops_per_token
from mor_jax.runs.optimizer import make_schedule
from mor_jax.sweep.isoflop import plan_isoflop, steps_for, with_scaled_steps, with_steps
from mor_jax.sweep.recipes import at_flops_of, expert, recursive, token, vanilla

DEBUG = vanilla("debug")


def test_steps_spend_the_budget_by_either_count():
    model = presets.get("vanilla-360m").config.model
    assert steps_for(model, 16.5e18, 1024) == presets.budget_steps(model, 16.5e18) == 9438
    tokens = 1024 * model.context_length
    for count, per_token in (("paper", paper_flops_per_token), ("training", train_flops_per_token)):
        steps = steps_for(model, 1e19, 1024, count)  # type: ignore[arg-type]
        assert abs(steps * tokens * per_token(model) / 1e19 - 1) < 1 / steps
    with pytest.raises(UserError, match="less than one step"):
        steps_for(model, 1e9, 1024)


def test_smaller_budgets_branch_off_the_stable_phase_of_the_largest():
    trunk, middle, small = plan_isoflop({"a": DEBUG}, [2e9, 8e9, 4e9], count="training")
    assert [run.name for run in (trunk, middle, small)] == ["a-8e+09", "a-4e+09", "a-2e+09"]
    assert trunk.start is None
    for branch in (middle, small):
        assert branch.start is not None and branch.start.run == trunk.name
        step = branch.start.step
        assert step in trunk.config.train.pinned_steps
        for run in (trunk, branch):  # both have learned at the same rates up to here
            schedule = make_schedule(run.config.optimizer, run.config.train.steps)
            assert float(schedule(step)) == pytest.approx(run.config.optimizer.learning_rate)
        decays = make_schedule(branch.config.optimizer, branch.config.train.steps)
        assert float(decays(step + 1)) < branch.config.optimizer.learning_rate


def test_what_cannot_branch_is_refused():
    with pytest.raises(UserError, match="warmup_steps"):
        plan_isoflop({"a": DEBUG}, [4e8, 8e9], count="training")
    cosine = dataclasses.replace(DEBUG, optimizer=dataclasses.replace(DEBUG.optimizer, schedule="cosine"))
    with pytest.raises(UserError, match="schedule='wsd'"):
        plan_isoflop({"a": cosine}, [2e9, 8e9])
    runs = plan_isoflop({"a": cosine}, [2e9, 8e9], count="training", branches=False)
    assert [run.start for run in runs] == [None, None]
    stages = (GrowthStage(0.5, 1),)
    grown = recursive("debug", 2)
    grown = dataclasses.replace(grown, train=dataclasses.replace(grown.train, growth=stages))
    with pytest.raises(UserError, match=r"a has train\.growth, .*: no branches"):
        plan_isoflop({"a": grown}, [2e9, 8e9], count="training")
    with pytest.raises(UserError, match="at least one budget"):
        plan_isoflop({"a": DEBUG}, [])


def test_a_run_of_another_length_has_warm_ups_of_the_same_share():
    routed = expert("small", 3, capacity_warmup_steps=80)
    short = with_scaled_steps(routed, 0.35)
    assert (routed.train.steps, routed.optimizer.warmup_steps) == (800, 40)
    assert (short.train.steps, short.optimizer.warmup_steps) == (280, 14)
    assert (short.model.routing.capacity_warmup_steps, short.model.routing.balance_warmup_steps) == (28, 0)
    chosen = with_scaled_steps(token("small", 3, balance_warmup_steps=100), 2.0)
    assert (chosen.model.routing.balance_warmup_steps, chosen.train.steps) == (200, 1600)
    assert with_scaled_steps(short, 1e-9).train.steps == 1  # and warm-ups of one step, which such a run allows
    pinned = with_steps(routed, 800, (700,))
    assert with_scaled_steps(pinned, 1.0) == pinned


def test_equal_flops_buy_routed_models_more_steps():
    base = vanilla("small")
    spent = train_flops_per_token(base.model) * base.train.steps
    for config in (expert("small", 2), expert("small", 3), recursive("small", 3)):
        matched = at_flops_of(config, base)
        assert train_flops_per_token(matched.model) * matched.train.steps == pytest.approx(spent, rel=1e-3)
    assert at_flops_of(expert("small", 3), base).train.steps > 1.2 * base.train.steps
    assert at_flops_of(recursive("small", 3), base).train.steps == base.train.steps
    grown = expert("small", 3)
    grown = dataclasses.replace(grown, train=dataclasses.replace(grown.train, growth=(GrowthStage(0.5, 1),)))
    matched = at_flops_of(grown, base)  # one pass costs less: more steps than without
    assert matched.train.steps > at_flops_of(expert("small", 3), base).train.steps
    assert run_flops(matched) == pytest.approx(run_flops(base), rel=1e-3)
    with pytest.raises(UserError, match="did you mean 'small'"):
        vanilla("smal")

"""A run that grows: what its stages train and leave alone, that nothing jumps, and that it resumes across a border."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import run, stopping_dataset
from tiny_runs import (
    NumberTokenizer,
    dataset_maker,
    make_batch,
    read_lines,
    saved_fingerprints,
    tiny_config,
    with_train,
)

from mor_jax.config import Config, GrowthStage, PerfConfig, RelaxationConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.evaluate.validation import validation_losses
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.flops import run_flops, train_flops_per_token
from mor_jax.model.transformer import init_params
from mor_jax.runs import restore
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import TrainState, abstract_train_state, init_train_state
from mor_jax.train import loop
from mor_jax.train import step as step_module
from mor_jax.train.objective import loss_fn
from mor_jax.train.phases import phases
from mor_jax.train.step import train_step

ONE, TWO = GrowthStage(1 / 3, 1), GrowthStage(1 / 3, 2)
PLAIN = RoutingConfig(kind="expert", residual="plain", alpha=2.0)


def growing(runs: Path | None = None, **train: Any) -> Config:
    """Two steps of one pass, then two of the whole model; every pass has a low-rank update of its own."""
    fields = {"steps": 4, "growth": (GrowthStage(0.5, 1),), "eval_every": 2, "save_every": 2}
    routing = dataclasses.replace(PLAIN, sampling="none")  # one validation less to compile
    config = tiny_config(runs, routing, **{**fields, **train})
    relaxation = RelaxationConfig(lora_rank=1, lora_targets=("down",))
    recursion = dataclasses.replace(config.model.recursion, relaxation=relaxation)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, recursion=recursion))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    """A run without interruption; its two programs serve the tests of this file too."""
    programs: dict[Any, Any] = {}
    compile_train_step = loop.compile_train_step

    def compiled(config: Config, mesh: Any, stage: Any, arrays: Any) -> Any:
        key = (stage, config.perf)
        programs[key] = programs.get(key) or compile_train_step(config, mesh, stage, arrays)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compiled)
        yield run(growing(tmp_path_factory.mktemp("straight")))
    assert len(programs) == 2


def state_at(folder: Path, step: int, into: Path) -> TrainState:
    """The whole state that a run had after a step."""
    shutil.copytree(folder / "checkpoints" / str(step), into / str(step))
    config, checkpoints = growing(), Checkpoints(into, keep=1, read_only=True)
    restored = checkpoints.restore(abstract_train_state(config, make_mesh(config.mesh, jax.devices()[:1])))
    checkpoints.close()
    assert restored is not None
    return restored.state


def leaves_of(tree: Any, name: str) -> list[np.ndarray]:
    """All leaves below a name, of the parameters or of the optimiser's moments."""
    found = jax.tree.leaves_with_path(tree)
    return [np.asarray(x) for path, x in found if f"'{name}'" in jax.tree_util.keystr(path)]


def test_metrics_and_validation_are_the_stages(straight):
    lines = read_lines(straight)
    assert [line["num_recursions"] for line in lines] == [1, 1, 2, 2]
    assert [line["step"] for line in lines if "validation_nll" in line] == [2]
    assert [line["step"] for line in lines if "validation_topk_nll" in line] == [4]
    for routed in ("tokens_per_depth", "boundaries_R"):
        assert [routed in line for line in lines] == [False] * 2 + [True] * 2


def test_what_a_stage_has_no_part_of_keeps_its_values_and_no_moments(straight, tmp_path):
    """Weight decay would shrink the router and the second pass's update, which wait for their stage."""
    first = init_train_state(growing(), make_mesh(growing().mesh, jax.devices()[:1]))
    one, whole = (state_at(straight, step, tmp_path / str(step)) for step in (2, 4))
    fresh = leaves_of(first.params, "router") + leaves_of(first.params, "down_down")
    assert len(fresh) == 2 and all(np.all(leaf != 0) for leaf in fresh)
    for state, trained in ((one, False), (whole, True)):
        (old,), (new,) = leaves_of(first.params, "router"), leaves_of(state.params, "router")
        assert np.array_equal(old, new) != trained
        moments = leaves_of(state.opt_state, "router")
        assert len(moments) == 2 and all(np.any(leaf != 0) == trained for leaf in moments)
    for state, trained in ((one, [True, False]), (whole, [True, True])):
        (old,), (new,) = leaves_of(first.params, "down_down"), leaves_of(state.params, "down_down")
        assert [not np.array_equal(old[r], new[r]) for r in range(2)] == trained
        for moment in leaves_of(state.opt_state, "down_up"):
            assert [bool(np.any(moment[r] != 0)) for r in range(2)] == trained


def test_running_boundaries_begin_where_routing_enters(straight, tmp_path):
    one, whole = (state_at(straight, step, tmp_path / str(step)).boundaries_R for step in (2, 4))
    assert np.all(np.isnan(one)) and np.isfinite(whole[1])


def test_stops_before_at_and_after_borders_change_nothing(straight, tmp_path):
    """SIGTERM after step 1, before the border; a crash just after the save at it, and one a step behind it."""
    config = growing(tmp_path)
    run(config, make_dataset=stopping_dataset(config, 0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert [line["step"] for line in read_lines(tmp_path / "tiny")] == [1]

    def crash() -> None:
        raise RuntimeError("power cut")

    for at in (2, 3):
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, make_dataset=stopping_dataset(config, at, crash))
        assert max(int(path.name) for path in (tmp_path / "tiny" / "checkpoints").iterdir()) == 2
    folder = run(config)
    assert read_lines(folder) == read_lines(straight)
    for step in (2, 4):
        assert saved_fingerprints(folder, step) == saved_fingerprints(straight, step)


def test_an_unfinished_run_is_evaluated_as_its_stage(straight, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "4")
    monkeypatch.setattr(restore, "load_tokenizer", lambda *_: NumberTokenizer())
    with caplog.at_level("INFO"):
        restored = restore.restore_run(folder)
    assert "step 2 of 4 is of a stage of train.growth: 1 pass, without router" in caplog.text
    assert restored.config.model.recursion.num_recursions == 1 and restored.config.train.growth == ()
    assert "router" not in restored.params
    config = growing()
    rest = {"context_length": config.model.context_length}
    held_out = dataset_maker(config)(config.data, split="validation", batch_size=4, **rest)
    losses = validation_losses(restored.weights, restored.config.perf, held_out, config.train.eval_rows)
    (line,) = [line for line in read_lines(straight) if line["step"] == 2]
    assert losses["validation_nll"] == pytest.approx(line["validation_nll"], rel=1e-6)


def test_a_finished_run_is_the_whole_model(straight, monkeypatch):
    monkeypatch.setattr(restore, "load_tokenizer", lambda *_: NumberTokenizer())
    restored = restore.restore_run(straight)
    assert restored.config.model == growing().model and restored.config.train.growth == growing().train.growth


def _routed(routing: RoutingConfig) -> Config:
    return dataclasses.replace(tiny_config(routing=routing), perf=PerfConfig(loss_chunk=16, execution="scan"))


def _random(config: Config) -> Any:
    """Parameters with nothing special about them, the same for every routing."""
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    draw = lambda path, x: np.random.default_rng(len(str(path))).normal(size=x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map_with_path(lambda path, x: (path[-1].key == "scale") + 0.2 * draw(path, x), shapes)


def _losses(config: Config, params: Any, *steps: int) -> list[float]:
    batch = {name: jnp.asarray(x) for name, x in make_batch(config, rows=2).items()}
    compute = jax.jit(lambda step: loss_fn(config, params, jnp.zeros(2), batch, jax.random.key(0), step)[1].lm)
    return [float(compute(jnp.int32(step))) for step in steps]


@pytest.fixture(scope="module")
def recursive_loss() -> float:
    config = _routed(RoutingConfig())
    return _losses(config, _random(config), 0)[0]


@pytest.mark.parametrize(
    "routing",
    [
        dataclasses.replace(PLAIN, capacities=(1.0, 1.0)),
        RoutingConfig("expert", capacities=(1.0, 1.0), gate_warmup_steps=4),
        RoutingConfig("token", score="softmax", alpha=1.0, gate_warmup_steps=4, balance_warmup_steps=4),
    ],
    ids=["plain", "paper, gate warms up", "token, gate warms up"],
)
def test_nothing_jumps_where_routing_enters(routing, recursive_loss):
    """At full capacity the first routed step has the recursive model's loss: by gates of 1, or any that warm up."""
    config = _routed(routing)
    params = _random(config)
    if not routing.gate_warmup_steps:
        params["router"] = jax.tree.map(np.zeros_like, params["router"])  # gates of 2 x sigmoid(0)
    entering, later = _losses(config, params, 0, 2)
    assert entering == pytest.approx(recursive_loss, rel=1e-6)
    if routing.gate_warmup_steps:
        assert abs(later - recursive_loss) > 1e-3 * recursive_loss


def test_a_warm_up_of_routing_begins_where_routing_enters():
    """Its steps run as `scan`, and the last steps as configured; a run without growth has them first."""
    routing = dataclasses.replace(PLAIN, capacity_warmup_steps=1)
    found = phases(tiny_config(routing=routing, growth=(ONE, TWO)))
    assert [(p.start, p.end, p.execution) for p in found] == [
        (0, 2, "gather"), (2, 4, "gather"), (4, 5, "scan"), (5, 6, "gather"),
    ]  # fmt: skip
    assert [(p.start, p.end, p.execution) for p in phases(tiny_config(routing=routing))] == [
        (0, 1, "scan"), (1, 6, "gather"),
    ]  # fmt: skip
    scan = dataclasses.replace(tiny_config(routing=routing), perf=PerfConfig(execution="scan"))
    assert [(p.start, p.end) for p in phases(scan)] == [(0, 6)]


def test_a_warm_up_counts_from_the_step_that_routing_enters(monkeypatch):
    """The second routed step has the capacities of a run's second step."""
    config = with_train(_routed(dataclasses.replace(PLAIN, capacity_warmup_steps=2)), growth=(ONE, TWO))
    seen = []

    def stop(*arguments: Any) -> None:
        seen.append(int(arguments[-1]))
        raise StopIteration

    monkeypatch.setattr(step_module, "_gradients", stop)
    state = init_train_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    with pytest.raises(StopIteration):
        train_step(config, dataclasses.replace(state, step=jnp.int32(5)), {}, stage=config.stages[-1])
    assert seen == [1]


def test_a_step_of_a_run_that_grows_needs_its_stage():
    with pytest.raises(UserError, match=r"train\.growth needs its stage"):
        train_step(growing(), None, {})  # type: ignore[arg-type]


def test_the_flops_of_a_run_are_those_of_its_stages():
    config = growing(steps=6, growth=(ONE, TWO))
    by_stage = [2 * 8 * 32 * train_flops_per_token(stage.model) for stage in config.stages]
    assert by_stage[0] < by_stage[2] < by_stage[1]
    assert run_flops(config) == pytest.approx(sum(by_stage))
    assert run_flops(config, 1, 5) == pytest.approx(by_stage[0] / 2 + by_stage[1] + by_stage[2] / 2)
    plain = with_train(config, growth=())
    assert run_flops(plain) == pytest.approx(6 * 8 * 32 * train_flops_per_token(plain.model))

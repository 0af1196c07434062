"""The plan of a train step: compiled for eight CPU devices in the place of a slice, and its estimates by hand."""

import dataclasses
import json
import math
from typing import get_args

import jax
import pytest

from mor_jax import presets
from mor_jax.cli.plan import PlanFlags
from mor_jax.config import Config, GrowthStage, MeshConfig, ModelConfig, RematPolicy
from mor_jax.errors import UserError
from mor_jax.mesh.devices import GIB
from mor_jax.model.flops import count_parameters, run_flops, train_flops_per_token
from mor_jax.model.optimizer_costs import optimizer_costs
from mor_jax.perf import kept_values
from mor_jax.plan import compile as compile_module
from mor_jax.plan.compile import DoesNotFitError, compile_step, plan_mesh
from mor_jax.plan.memory import estimate_bytes, tokens_per_device
from mor_jax.plan.report import print_report, report
from mor_jax.plan.roofline import estimate_received, memory_traffic, roofline, step_flops
from mor_jax.plan.run_total import with_run_total
from mor_jax.plan.search import advise, candidates, ranked_plans
from mor_jax.plan.topology import GENERATIONS, Topology
from mor_jax.runs.state import TrainState, abstract_train_state


def _config(name: str = "debug", **mesh: int) -> Config:
    return dataclasses.replace(presets.get(name).config, mesh=MeshConfig(**mesh))


def _topology(slices: int = 1, devices: int = 8, generation: str = "v5e") -> Topology:
    """A slice that consists of this host's fake devices; described devices are not needed for arithmetic."""
    return Topology(f"{generation}:2x4", slices, GENERATIONS[generation], tuple(jax.devices() * (devices // 8)))


@pytest.fixture(scope="module")
def plan():
    return report(compile_step(_config(fsdp=2, tensor=2), _topology()), ["mor", "plan", "debug"])


def test_memory_by_kind_adds_up(plan):
    """Two moments weigh twice the weights; what is not split is small."""
    memory = plan["memory_per_device"]
    whole = 4 * count_parameters(_config().model).total
    assert whole / 4 <= memory["parameters"] <= 1.2 * whole / 4  # fsdp x tensor = 4 shards, norms and routers whole
    assert memory["optimiser"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["batch"] >= 2 * 8 // 4 * 129 * 4  # two int32 arrays (positions are not read), a row pair per device
    kinds = ("parameters", "optimiser", "batch", "activations", "code")
    assert memory["total"] == sum(memory[kind] for kind in kinds)


def test_the_optimiser_is_stated_beside_the_model(plan, capsys):
    """Muon keeps one moment of a layer's weights; its products are told apart in the program, and by arithmetic."""
    model = ModelConfig(32, 2, 16, 4, 2, 4, 16, 16, dtype="float32")
    config = _config(fsdp=2, tensor=2)
    optimizer = dataclasses.replace(config.optimizer, kind="muon")
    config = dataclasses.replace(config, model=model, optimizer=optimizer)
    muon = report(compile_step(config, _topology()), ["mor", "plan", "debug", "--optimizer.kind", "muon"])
    memory, costs = muon["memory_per_device"], muon["optimizer"]
    matrices = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 16)
    assert 2 * memory["parameters"] - memory["optimiser"] == pytest.approx(4 * matrices / 4, abs=100)  # and counters
    assert muon["flops"]["model"] == train_flops_per_token(model) * 8 * 16, "the optimiser's are not the model's"
    assert costs["share_of_model_flops"] == costs["flops"] / muon["flops"]["model"]
    assert costs["flops_per_device"] > costs["flops"] / 8  # whole matrices: some devices have one less
    # XLA's CPU compiler leaves some products without the name of their place; TPU's does not
    assert 0.5 * costs["flops_per_device"] < costs["compiled_flops_per_device"] <= costs["flops_per_device"]
    adamw = plan["optimizer"]
    assert (adamw["kind"], adamw["flops"], adamw["compiled_flops_per_device"]) == ("adamw", 0, 0)
    assert costs["received_per_device"] >= optimizer_costs(config, muon["mesh"]).received > 0
    print_report(plan)
    print_report(muon)
    printed = capsys.readouterr().out
    assert "optimiser adamw, per step: no matrix products; one device moves" in printed
    assert f"optimiser muon, per step: {costs['flops']:.4g} FLOPs (" in printed


def test_flops_are_the_exact_count(plan):
    config = _config()
    assert plan["flops"]["per_token"] == train_flops_per_token(config.model)
    assert plan["flops"]["model"] == train_flops_per_token(config.model) * 8 * 128


def test_compiled_products_are_at_least_the_share_of_a_device(plan):
    """All scores count on a CPU, products against nothing are left out, none is split less than asked for."""
    assert 0.9 < plan["flops"]["compiled_per_device"] * 8 / plan["flops"]["executed"] < 1.3


def test_gradients_and_weights_travel(plan):
    """At least: every weight gathered once, every gradient summed, over fsdp."""
    total = sum(kind["bytes"] for kind in plan["collectives_per_device"].values())
    weights = 4 * count_parameters(_config().model).non_embedding
    assert total > weights / 2
    assert all(kind["bytes_across"] == 0 for kind in plan["collectives_per_device"].values())


def test_a_plan_is_json_and_prints(plan, capsys):
    assert json.loads(json.dumps(plan)) == plan
    print_report(plan)
    printed = capsys.readouterr().out
    assert "data 2 x fsdp 2 x tensor 2" in printed and "estimate, nothing measured" in printed
    assert plan["attention"] == "xla" and plan["command"] == "mor plan debug"


def test_the_plan_of_a_run_that_grows_adds_its_stages_up(plan, capsys):
    """Half of the steps pass once and cost less; the step, and what it takes, are the last stage's."""
    config = _config(fsdp=2, tensor=2)
    grown = dataclasses.replace(config, train=dataclasses.replace(config.train, growth=(GrowthStage(0.5, 1),)))
    total = with_run_total(plan, grown, _topology())
    one, whole = total["run"]["stages"]
    assert (one["steps"], whole["steps"]) == (20, 20)
    assert one["flops"] < whole["flops"] == 20 * plan["flops"]["model"]
    assert total["run"]["flops"] == one["flops"] + whole["flops"] == run_flops(grown)
    assert one["seconds_per_step_at_least"] < whole["seconds_per_step_at_least"]
    assert total["memory_per_device"]["total"] == max(one["memory"], whole["memory"])
    assert total["flops"] == plan["flops"]
    print_report(total)
    printed = capsys.readouterr().out
    assert "the step of the last stage of train.growth" in printed and "1 pass, without router" in printed
    assert "together" in printed


def test_the_bound_is_the_longest_time():
    config, sizes = _config("vanilla-360m"), {"slice": 1, "data": 8, "fsdp": 8, "context": 1, "tensor": 1}
    bound = roofline(config, sizes, GENERATIONS["v5e"], (200e9 * 3, 3.125e9 * 4))
    assert (bound.network, bound.network_across, bound.limit, bound.seconds) == (3.0, 4.0, "network across", 4.0)
    assert bound.tokens_per_second == 1024 * 2048 / 4
    assert bound.mfu == pytest.approx(step_flops(config).model / 4 / 64 / 197e12)


def test_rematerialisation_counts_what_runs_again():
    config = _config("mor-360m-expert-r3")
    flops = {
        remat: step_flops(dataclasses.replace(config, perf=dataclasses.replace(config.perf, remat=remat)))
        for remat in get_args(RematPolicy)
    }
    assert flops["none"].model == flops["full"].model
    kinds: tuple[RematPolicy, ...] = ("none", "names", "projections", "attention", "full")
    order = [flops[remat].executed for remat in kinds]
    assert order == sorted(set(order)) and order[-1] < 4 / 3 * order[0]
    assert flops["none"].executed > flops["none"].model  # the kernel makes its scores again


def test_estimates_follow_the_mesh():
    config = _config("vanilla-1.7b")
    whole = {"slice": 1, "data": 64, "fsdp": 1, "context": 1, "tensor": 1}
    split = {**whole, "data": 4, "fsdp": 16}
    saved = estimate_bytes(config, whole) - estimate_bytes(config, split)
    assert saved == pytest.approx(16 * count_parameters(config.model).total * 15 / 16)  # state and gradients
    muon = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="muon"))
    layers = config.model.num_layers * 2048 * (2 * 2048 + 2 * 2048 + 3 * 8192)  # 32 heads, no groups
    assert estimate_bytes(config, split) - estimate_bytes(muon, split) == pytest.approx(4 * layers / 16)
    assert estimate_received(muon, split)[0] > estimate_received(config, split)[0]
    assert (
        roofline(muon, split, GENERATIONS["v5e"], (0, 0)).arithmetic
        > roofline(config, split, GENERATIONS["v5e"], (0, 0)).arithmetic
    )
    assert tokens_per_device(config, whole) == tokens_per_device(config, split) == 16 * 2048
    assert memory_traffic(config, split) < memory_traffic(config, whole)
    assert estimate_received(config, whole)[0] < estimate_received(config, split)[0]
    two_slices = {**split, "slice": 2, "data": 2}
    assert estimate_received(config, split)[1] == 0 < estimate_received(config, two_slices)[1]
    order = [
        kept_values(config.model, remat) for remat in ("full", "attention", "projections", "names", "dots", "none")
    ]
    assert order == sorted(order)


def test_candidates_divide_and_come_fastest_first():
    config, topology = _config("vanilla-1.7b"), _topology(devices=64)
    found = candidates(config, topology)
    assert len(found) > 10
    seconds = [c.bound.serial for c in found]
    assert seconds == sorted(seconds)
    for candidate in found:
        mesh, train = candidate.config.mesh, candidate.config.train
        assert math.prod(vars(mesh).values()) == 64
        assert train.batch_size % (train.accumulation * mesh.data * mesh.fsdp) == 0
        assert 2048 // mesh.fsdp >= 32 and 32 % mesh.tensor == 0
    assert {c.config.perf.remat for c in found} > {"full"}


def test_advice_names_flags_that_fit_by_estimate():
    """1.7B with everything kept does not fit on 64 small chips; the advice does."""
    config = _config("vanilla-1.7b")
    assert estimate_bytes(config, {**vars(config.mesh), "data": 64}) > GENERATIONS["v5e"].program_bytes
    advice = advise(config, _topology(devices=64))
    assert "--mesh.fsdp" in advice and "--perf.remat" in advice and "chips" not in advice
    assert "on 16 chips" in advise(config, _topology()) or "on 8 chips" not in advise(config, _topology())


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.41G of 15.75G hbm.", 23.41),
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(1.25T) exceeds available HBM (15.75G). HLO module: jit__lambda.",
            1280,
        ),
    ],
)
def test_out_of_memory_is_read_off_the_compiler(monkeypatch, message, needed):
    def compile_nothing(*_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(compile_module, "compile_train_step", compile_nothing)
    with pytest.raises(DoesNotFitError, match=rf"needs {needed:.2f} GiB of the 15.75 GiB of a v5e chip") as caught:
        compile_step(_config(), _topology())
    assert caught.value.needed == pytest.approx(needed * GIB)


def test_what_a_search_compiled_is_ranked_by_the_clock_and_the_network():
    def plan(bound: float, **clock: dict[str, float]) -> dict:
        seconds = {"arithmetic": 9.0, "memory": 9.0, "network": 0.2 * bound, "network_across": 0.1}
        return {"estimate": {"seconds": seconds, "tokens_per_second_at_most": bound}, **clock}

    a, b, c = (plan(bound, clock={"seconds": seconds}) for bound, seconds in ((1.0, 3.0), (2.0, 2.5), (4.0, 2.3)))
    assert ranked_plans([a, b, c]) == [b, c, a]  # 2.5 + 0.4, 2.3 + 0.8, 3.0 + 0.2, and 0.1 each
    assert ranked_plans([plan(1.0), plan(2.0)]) == [plan(2.0), plan(1.0)]


def test_slices_become_a_mesh_axis():
    config = _config()
    assert plan_mesh(config, _topology(slices=2))[1].shape["slice"] == 2
    with pytest.raises(UserError, match="does not multiply to the 8 devices"):
        plan_mesh(_config(data=3), _topology())


def test_own_flags_do_not_collide_with_the_configuration():
    fields = {f.name for f in dataclasses.fields(Config)}
    assert not fields & {f.name for f in dataclasses.fields(PlanFlags)}


def test_state_sharding_is_what_memory_counts():
    """An abstract state holds all that training holds."""
    config, mesh = plan_mesh(_config(fsdp=2), _topology())
    assert isinstance(abstract_train_state(config, mesh), TrainState)
